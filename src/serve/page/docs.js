// The page at /docs: /openapi.json for people.
"use strict";

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function operation(method, path, of) {
  const box = make("article");
  const title = make("h3");
  title.append(make("code", method.toUpperCase() + " " + path));
  box.append(title, make("p", of.summary || of.description || ""));
  const parameters = (of.parameters || []).map((p) => p.name + " (" + p.in + ")" + (p.required ? "" : ", optional"));
  if (parameters.length) box.append(make("p", "Parameters: " + parameters.join("; "), "quiet"));
  const table = make("table");
  for (const [status, response] of Object.entries(of.responses || {})) {
    const line = make("tr");
    line.append(make("th", status), make("td", response.description || "The answer"));
    table.append(line);
  }
  box.append(table);
  return box;
}

async function show() {
  const document_ = await (await fetch("/openapi.json")).json();
  const groups = new Map();
  for (const [path, methods] of Object.entries(document_.paths)) {
    for (const [method, of] of Object.entries(methods)) {
      const group = (of.tags || ["other"])[0];
      groups.set(group, [...(groups.get(group) || []), operation(method, path, of)]);
    }
  }
  const main = document.getElementById("routes");
  main.replaceChildren();
  for (const [group, operations] of groups) main.append(make("h2", group), ...operations);
  const v2 = make("article");
  v2.append(make("h3", "/v2"), make("p", "The Open Inference Protocol, with binary tensors: a task is a model. Inputs text and text_pair (BYTES [N]), outputs label (BYTES [N]), score and logits (FP32 [N, C])."));
  main.append(make("h2", "Open Inference Protocol"), v2, make("h2", "Shapes"));
  const shapes = make("pre", JSON.stringify(document_.components ? document_.components.schemas : {}, null, 2));
  main.append(shapes);
}

show().catch((error) => { document.getElementById("routes").replaceChildren(make("p", error.message, "bad")); });
