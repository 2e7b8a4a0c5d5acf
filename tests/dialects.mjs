// Requests come in as JSON, each with the scheme to verify by and the secret; out goes a list of true and false.
// Only what a library says when a signature does not fit is a no: anything else it throws ends this.
import { readFileSync } from "node:fs";
import { verify as verifyGithub } from "@octokit/webhooks-methods";
import { Webhook, WebhookVerificationError } from "standardwebhooks";
import Stripe from "stripe";
import { Webhook as Svix, WebhookVerificationError as SvixVerificationError } from "svix";

const { StripeSignatureVerificationError } = Stripe.errors;
const refusals = [WebhookVerificationError, SvixVerificationError, StripeSignatureVerificationError];

const schemes = {
  standard: ({ secret, headers, body }) => new Webhook(secret).verify(body, headers),
  svix: ({ secret, headers, body }) => new Svix(secret).verify(body, headers),
  stripe: ({ secret, headers, body }) =>
    Stripe.webhooks.signature.verifyHeader(body, headers["stripe-signature"], secret, 300),
  github: async ({ secret, headers, body }) => {
    if (!(await verifyGithub(secret, body, headers["x-hub-signature-256"])))
      throw new WebhookVerificationError("no");
  },
};

async function fits(request) {
  const body = Buffer.from(request.body, "base64").toString();
  try {
    await schemes[request.scheme]({ ...request, body });
    return true;
  } catch (error) {
    if (refusals.some((refusal) => error instanceof refusal)) return false;
    throw error;
  }
}

const answers = [];
for (const request of JSON.parse(readFileSync(0, "utf8"))) answers.push(await fits(request));
console.log(JSON.stringify(answers));
