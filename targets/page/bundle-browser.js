// Copies ONNX Runtime for WebAssembly into examples/browser/vendor/, whole or not at all, and Mermaid, by which a test
// parses flowcharts, into tests/vendor/.
import { cpSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const FILES = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];
const PACKAGES = ["onnxruntime-web", "onnxruntime-common"]; // the second is inside the first's file

process.chdir(fileURLToPath(new URL(".", import.meta.url)));
const vendor = "../../examples/browser/vendor";
rmSync(`${vendor}.part`, { recursive: true, force: true });
mkdirSync(`${vendor}.part`);
for (const name of FILES) cpSync(`node_modules/onnxruntime-web/dist/${name}`, `${vendor}.part/${name}`);
const licences = PACKAGES.map((name) => {
  const { version, license, author } = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  return `${name} ${version} (${license}), https://github.com/microsoft/onnxruntime, packaged by ${author}`;
});
const note = "Copyright (c) Microsoft Corporation. The packages carry no file with their licence's text.";
writeFileSync(`${vendor}.part/LICENSES.txt`, `${licences.join("\n")}\n${note}\n`);
rmSync(vendor, { recursive: true, force: true });
renameSync(`${vendor}.part`, vendor);
mkdirSync("../../tests/vendor", { recursive: true });
cpSync("node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js", "../../tests/vendor/mermaid.tiny.js");
rmSync("node_modules", { recursive: true, force: true });
