// Opens a page of a file in headless Chromium: light, dark and narrow. Run by itself, it keeps screenshots:
//   node look.js report.html DIRECTORY

import { existsSync, mkdirSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

import axe from "axe-core";
import { chromium } from "playwright-core";

const PLACES = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome", "/usr/bin/google-chrome-stable"];

/// The views in which a page is looked at.
export const VIEWS = {
  light: { colorScheme: "light", viewport: { width: 1280, height: 900 } },
  dark: { colorScheme: "dark", viewport: { width: 1280, height: 900 } },
  narrow: { colorScheme: "light", viewport: { width: 390, height: 844 } },
};

export async function browser() {
  const executablePath = process.env.CHROMIUM || PLACES.find((place) => existsSync(place));
  if (!executablePath) throw new Error("there is no Chromium; install it, or set CHROMIUM");
  // Root, in a container, has no sandbox.
  return chromium.launch({ executablePath, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
}

/// Calls `look(page)` on the page, and gives back the requests that it made beside its own file, and what went wrong in it.
export async function open(chrome, file, view, look) {
  const context = await chrome.newContext({ ...VIEWS[view], reducedMotion: "reduce" });
  const page = await context.newPage();
  const own = pathToFileURL(resolve(file)).href;
  const requests = [];
  const errors = [];
  page.on("request", (request) => request.url().split("#")[0] === own || requests.push(request.url()));
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  await page.goto(own);
  await look(page);
  await context.close();
  return { requests, errors };
}

/// Faults of accessibility that axe calls serious or critical.
export async function faults(page) {
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  return violations
    .filter((v) => ["serious", "critical"].includes(v.impact))
    .map((v) => `${v.id}: ${v.nodes.map((n) => `${n.html.slice(0, 160)} ${n.failureSummary}`).slice(0, 3).join("\n")}`);
}

if (process.argv[1] && import.meta.url === pathToFileURL(resolve(process.argv[1])).href) {
  const [file, out] = process.argv.slice(2);
  mkdirSync(out, { recursive: true });
  const chrome = await browser();
  for (const view of Object.keys(VIEWS)) {
    const found = await open(chrome, file, view, async (page) => {
      await page.locator("details").first().evaluate((d) => (d.open = true)).catch(() => {});
      await page.screenshot({ path: `${out}/${view}.png`, fullPage: true });
      console.log(view, await faults(page));
    });
    console.log(view, found);
  }
  await chrome.close();
}
