// The page of `weir replay --out` in a real browser: light, dark and narrow.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { VIEWS, browser, faults, open } from "./look.js";

const directory = mkdtempSync(join(tmpdir(), "weir-report-"));
const page = join(directory, "report", "report.html");
let chrome;

before(async () => {
  const rows = [];
  for (let n = 0; n < 60; n += 1) {
    const task = n % 2 ? "sums" : "capitals";
    const query = n % 2 ? `What is ${n} times ${n + 7}? Show <b>every</b> step of it.` : `The capital of country ${n}?`;
    const outcome = (model, score, cost_usd) => ({ query_id: `q${n}`, task, query, model, score, cost_usd, latency_ms: 100 + n });
    rows.push(outcome("weak", 1 - (n % 2), 0.001), outcome("strong", n % 7 ? 1 : 0.5, 0.01));
  }
  writeFileSync(join(directory, "made.jsonl"), rows.map((row) => JSON.stringify(row)).join("\n"));
  const policy = (name, rest) => {
    const file = join(directory, `${name}.yaml`);
    writeFileSync(file, `policy: ${name}\nmodels: {weak: {name: weak}, strong: {name: strong}}\n${rest}\n`);
    return file;
  };
  const files = [
    policy("even", "select: {arms: [weak, strong], weighted: {weak: 1, strong: 1}}"),
    policy("rule", "rules: [{name: long, when: signals.tokens > 12, use: strong}]\nselect: {arms: [weak, strong], static: weak}"),
    policy("bandit", "select: {arms: [weak, strong], linucb: {}, features: [tokens]}\nreward: {quality: {weight: 1, from: feedback.score}}"),
  ];
  const weir = process.env.WEIR_BIN || "../../target/debug/weir";
  const data = join(directory, "made.jsonl");
  execFileSync(weir, ["replay", "--data", data, "--seeds", "3", "--out", join(directory, "report"), "--policy", ...files], {
    stdio: "ignore",
  });
  chrome = await browser();
});

after(async () => {
  await chrome?.close();
  rmSync(directory, { recursive: true });
});

for (const view of Object.keys(VIEWS)) {
  test(`${view}: nothing is asked of the network, and everybody can read it`, async () => {
    const { requests, errors } = await open(chrome, page, view, async (page) => {
      for (const details of await page.locator("details").all()) await details.evaluate((d) => (d.open = true));
      assert.deepEqual(await faults(page), []);
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
      assert.ok(wide <= 0, `the page is ${wide} pixels too wide`);
    });
    assert.deepEqual(requests, []);
    assert.deepEqual(errors, []);
  });
}

test("tables are sorted by a click, numbers by their value", () =>
  open(chrome, page, "light", async (page) => {
    const table = page.locator("table").first();
    const column = async () => (await table.locator("tbody th").allTextContents()).slice(0, 3);
    const header = table.locator("thead th", { hasText: "USD" });
    const button = header.locator("button");
    await button.click();
    assert.equal((await column())[0], "always strong");
    assert.equal(await header.getAttribute("aria-sort"), "descending");
    await button.click();
    assert.equal((await column())[0], "always weak");
    await table.locator("thead button").first().click();
    assert.deepEqual(await column(), ["always strong", "always weak", "bandit"]);
  }));

test("curves say what their points are, and text of queries stays text", () =>
  open(chrome, page, "light", async (page) => {
    const titles = await page.locator("svg circle, svg rect").evaluateAll((all) => all.map((c) => c.parentNode.querySelector("title").textContent));
    assert.ok(titles.some((title) => title.startsWith("even: 0.7")), titles.join("\n"));
    assert.equal(await page.locator("details b").count(), 0);
    await page.locator("summary").first().click();
    assert.ok((await page.locator("details pre").first().textContent()).includes("<b>every</b>"));
  }));
