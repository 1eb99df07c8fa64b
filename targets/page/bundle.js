// Copies the minified libraries and their licences from node_modules/ into vendor/, whole or not at all.
import { cpSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const SCRIPTS = {
  "cytoscape.min.js": "cytoscape/dist/cytoscape.min.js",
  "dagre.min.js": "@dagrejs/dagre/dist/dagre.min.js",
};
const PACKAGES = ["cytoscape", "@dagrejs/dagre", "@dagrejs/graphlib"]; // graphlib is inside dagre's file

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
rmSync("vendor.part", { recursive: true, force: true });
mkdirSync("vendor.part");
for (const [name, path] of Object.entries(SCRIPTS)) cpSync(`node_modules/${path}`, `vendor.part/${name}`);
const licences = PACKAGES.map((name) => {
  const { version, license } = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  return `${name} ${version} (${license})\n\n${readFileSync(`node_modules/${name}/LICENSE`, "utf8").trim()}\n`;
});
writeFileSync("vendor.part/LICENSES.txt", licences.join("\n\n"));
rmSync("vendor", { recursive: true, force: true });
renameSync("vendor.part", "vendor");
rmSync("node_modules", { recursive: true, force: true });
