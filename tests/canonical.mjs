// One JSON text a line in, what JavaScript writes for its value out: the authority test_canonical.py compares with.
// Splits at line feeds alone, because U+2028 is a line end to everything but JSON.
import { readFileSync } from "node:fs";

const texts = readFileSync(0, "utf8").split("\n");
process.stdout.write(texts.map((text) => JSON.stringify(JSON.parse(text))).join("\n"));
