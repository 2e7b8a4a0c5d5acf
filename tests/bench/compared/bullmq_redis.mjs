// BullMQ with Redis on Node: a worker that posts, and the application that adds the jobs.
//
// Set-up: `python -m tests.bench --setup bullmq`, which is
// `apt-get install redis-server nodejs npm` and `npm install bullmq ioredis` into .bench/node.
//
// `node bullmq_redis.mjs MODULES app|worker`, with WEBHOOK_URL, WEBHOOK_SECRET, WEBHOOK_CA and BROKER in the
// environment. The application answers each order on stdin, {"events": …}, when so many are handed over.

import { createHmac, randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { Agent, request } from "node:https";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const { Queue, Worker } = createRequire(`${process.argv[2]}/`)("bullmq");
const [, , , role] = process.argv;
const { hostname: host, port } = new URL(process.env.BROKER);
const connection = { host, port: Number(port), maxRetriesPerRequest: null };
const AT_ONCE = 32; // jobs that are added, and jobs that are worked at
const CONTENT = "The quick brown fox jumps over the lazy dog. ".repeat(11).slice(0, 477); // 600 bytes in all

const OPTIONS = {
  attempts: 4,
  backoff: { type: "exponential", delay: 5000 },
  removeOnComplete: true,
};

function submission(number) {
  const data = {
    postId: `post_${String(number).padStart(8, "0")}`,
    platforms: ["x", "linkedin"],
    views: number,
    content: CONTENT,
  };
  const body = JSON.stringify({ event: "post.published", timestamp: new Date().toISOString(), data });
  return { id: `evt_${randomUUID().replaceAll("-", "")}`, body };
}

async function app() {
  const queue = new Queue("webhooks", { connection });
  await queue.waitUntilReady();
  for await (const order of createInterface({ input: process.stdin })) {
    const started = process.hrtime.bigint();
    const { events } = JSON.parse(order);
    let next = 0;
    const add = async () => {
      while (next < events) await queue.add("deliver", submission(next++), OPTIONS);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, add));
    const ended = process.hrtime.bigint();
    console.log(JSON.stringify({ started_at: Number(started) / 1e9, ended_at: Number(ended) / 1e9 }));
  }
  await queue.close();
}

const url = new URL(process.env.WEBHOOK_URL);
const key = Buffer.from(process.env.WEBHOOK_SECRET.slice("whsec_".length), "base64");
const agent = new Agent({ keepAlive: true, maxSockets: AT_ONCE, ca: readFileSync(process.env.WEBHOOK_CA) });

function deliver({ data: { id, body } }) {
  const timestamp = Math.floor(Date.now() / 1000);
  const mac = createHmac("sha256", key).update(`${id}.${timestamp}.${body}`).digest("base64");
  const headers = {
    "Content-Type": "application/json",
    "Content-Length": Buffer.byteLength(body),
    "webhook-id": id,
    "webhook-timestamp": timestamp,
    "webhook-signature": `v1,${mac}`,
  };
  return new Promise((resolve, reject) => {
    const posted = request(url, { method: "POST", agent, headers, timeout: 15000 }, (answer) => {
      answer.resume();
      answer.on("error", reject);
      answer.on("end", () =>
        answer.statusCode >= 200 && answer.statusCode < 300
          ? resolve()
          : reject(new Error(`answered ${answer.statusCode}`)),
      );
    });
    posted.on("timeout", () => posted.destroy(new Error("timed out")));
    posted.on("error", reject);
    posted.end(body);
  });
}

if (role === "app") await app();
else new Worker("webhooks", deliver, { connection, concurrency: AT_ONCE }).on("error", console.error);
