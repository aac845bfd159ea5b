// The page at /: ask one task or all, see the tasks, see what the server does now.
"use strict";

const SHOWN = 200; // tasks in the table; the search finds the others
const ASKED = 64; // tasks that "all" asks in one request
const ALL = "*";
const $ = (id) => document.getElementById(id);
let tasks = [];

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { authorization: "Bearer " + key } : {};
  const response = await fetch(path, { ...options, headers });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(body.error ? body.error.message : "the server answered " + response.status);
    error.status = response.status;
    throw error;
  }
  return body;
}

function say(text, bad) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "quiet";
}

const number = (x) => x.toLocaleString("en", { maximumFractionDigits: x < 10 ? 1 : 0 });

// Tasks ---------------------------------------------------------------------------------------------------------------

async function loadTasks() {
  try {
    tasks = (await call("/v1/tasks")).tasks;
  } catch (error) {
    if (error.status === 401) $("key-box").open = true;
    say(error.message, true);
    return;
  }
  const chosen = $("task").value;
  $("task").replaceChildren(
    option(ALL, "All tasks that take this input"),
    ...tasks.map((t) => option(t.task, t.task)),
  );
  if (tasks.some((t) => t.task === chosen)) $("task").value = chosen;
  showTasks();
  showPair();
}

function option(value, text) {
  const element = make("option", text);
  element.value = value;
  return element;
}

function showTasks() {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = tasks.filter((t) => t.task.toLowerCase().includes(wanted));
  $("tasks").replaceChildren(...found.slice(0, SHOWN).map(row));
  const rest = found.length - SHOWN;
  $("more").textContent = tasks.length === 0 ? "There is no task yet." : rest > 0 ? rest + " more: search for them." : "";
}

function row(task) {
  const line = make("tr");
  const name = make("td");
  const choose = make("button", task.task);
  choose.type = "button";
  choose.addEventListener("click", async () => {
    $("task").value = task.task;
    await describe(task);
    $("text").focus();
  });
  name.append(choose);
  const labels = task.labels ? task.labels.join(", ") : task.problem === "regression" ? "a value" : "";
  const metrics = Object.entries(task.metrics || {}).map(([k, v]) => k + " " + v.toFixed(3)).join(", ");
  const state = make("td", task.state + (task.pinned ? ", pinned" : ""));
  if (task.error) {
    state.append(make("div", task.error, "bad"));
  }
  const patch = make("td");
  if (task.patch) patch.append(make("code", task.patch.slice(0, 8)));
  line.append(name, state, make("td", labels), make("td", metrics), patch);
  return line;
}

// A task that is not live says what it is only when it is asked.
async function describe(task) {
  if (task.texts === undefined && !task.error) {
    try {
      Object.assign(task, await call("/v1/tasks/" + encodeURIComponent(task.task)), { state: task.state });
    } catch (error) {
      task.error = error.message;
    }
    showTasks();
  }
  showPair();
}

function showPair() {
  const task = tasks.find((t) => t.task === $("task").value);
  const one = task && task.texts === 1;
  $("pair").hidden = one || ($("task").value === ALL && !tasks.some((t) => t.texts === 2));
}

// Asking --------------------------------------------------------------------------------------------------------------

async function ask(event) {
  event.preventDefault();
  const input = { text: $("text").value };
  if (!$("pair").hidden && $("text_pair").value.trim()) input.text_pair = $("text_pair").value;
  $("send").disabled = true;
  say("Asking …");
  const began = performance.now();
  try {
    const names = await namesFor(input);
    if (names.length === 0) throw new Error("no task takes such an input");
    const body = JSON.stringify({ tasks: names, inputs: [input] });
    const { results } = await call("/v1/predict", { method: "POST", body });
    $("answers").replaceChildren(...results.map(answer));
    // Those that were asked are live now.
    loadTasks();
    say(results.length + (results.length === 1 ? " task in " : " tasks in ") + number(performance.now() - began) + " ms");
  } catch (error) {
    if (error.status === 401) $("key-box").open = true;
    $("answers").replaceChildren();
    say(error.message, true);
  }
  $("send").disabled = false;
}

async function namesFor(input) {
  if ($("task").value !== ALL) return [$("task").value];
  const texts = input.text_pair === undefined ? 1 : 2;
  const usable = tasks.filter((t) => t.state !== "refused").slice(0, ASKED);
  await Promise.all(usable.map(describe));
  return usable.filter((t) => t.texts === texts).map((t) => t.task);
}

function answer({ task, patch, predictions }) {
  const box = make("article");
  const title = make("h3", task);
  title.append(make("span", patch.slice(0, 8)));
  box.append(title);
  const prediction = predictions[0];
  if (prediction.value !== undefined) {
    box.append(make("p", String(prediction.value)));
    return box;
  }
  const scores = Object.entries(prediction.scores).sort((a, b) => b[1] - a[1]).slice(0, 10);
  for (const [label, score] of scores) {
    const bar = make("div", undefined, label === prediction.label ? "bar best" : "bar");
    const meter = make("meter");
    meter.value = score;
    meter.setAttribute("aria-label", label);
    bar.append(make("span", label), meter, make("span", (100 * score).toFixed(1) + " %"));
    box.append(bar);
  }
  return box;
}

// Now -----------------------------------------------------------------------------------------------------------------

let last = null;
const history = [];

async function look() {
  let info;
  try {
    info = await call("/info");
  } catch (error) {
    if (error.status !== 401) $("about").textContent = "The server does not answer.";
    return;
  }
  $("about").textContent = info.model_id + ", " + info.model_dtype + ", version " + info.version;
  $("waiting").textContent = number(info.queue.questions);
  $("live-tasks").textContent = number(info.live_tasks);
  $("memory").textContent = number(info.patch_memory_bytes / 1e6) + " MB";
  if (last) {
    const seconds = Math.max(info.uptime_s - last.uptime_s, 0.001);
    const rate = (name) => Math.max(0, (info.done[name] - last.done[name]) / seconds);
    $("questions").textContent = number(rate("questions"));
    $("tokens").textContent = number(rate("tokens"));
    $("busy").textContent = number(Math.min(100, rate("forward_us") / 1e4)) + " %";
    history.push(rate("tokens"));
    if (history.length > 60) history.shift();
    const most = Math.max(1, ...history);
    $("line").setAttribute("points", history.map((y, i) => (i * 240) / 59 + "," + (39 - (38 * y) / most)).join(" "));
  }
  last = info;
}

$("ask").addEventListener("submit", ask);
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("filter").addEventListener("input", showTasks);
$("task").addEventListener("change", () => {
  const task = tasks.find((t) => t.task === $("task").value);
  if (task) describe(task); else showPair();
});
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  loadTasks();
});
loadTasks();
look();
setInterval(look, 2000);
setInterval(() => document.hidden || loadTasks(), 15000);
