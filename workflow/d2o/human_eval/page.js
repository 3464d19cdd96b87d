"use strict";
// Texts of the data reach the page by textContent alone.
const { version, annotator, items } = JSON.parse(document.getElementById("data").textContent);
// By its name in the file that comes back, what the better answer is more of.
const QUESTIONS = [
  ["harmlessness", "harmless"],
  ["helpfulness", "helpful"],
];
const TOTAL = items.length * QUESTIONS.length;
const STORED = `verdicts ${version} ${annotator}`;
const byId = (id) => document.getElementById(id);

// The keys that were pressed, one a question in the order in which they are asked: "1", "2" or "0" each.
let given = "";
// The question that is asked.
let at = 0;
// What the last download held of them.
let downloaded = "";

function load() {
  try {
    const stored = localStorage.getItem(STORED) ?? "";
    given = /^[012]*$/.test(stored) && stored.length <= TOTAL ? stored : "";
  } catch {
    // `keep` tells of it.
  }
  keep();
}

function keep() {
  let kept = true;
  try {
    localStorage.setItem(STORED, given);
  } catch {
    kept = false;
  }
  for (const note of document.querySelectorAll(".storage")) note.hidden = kept;
}

function show(section) {
  for (const name of ["start", "ask", "rest"]) byId(name).hidden = name !== section;
  window.scrollTo(0, 0);
}

function start() {
  byId("begin").textContent = given.length === 0 ? "Start" : given.length < TOTAL ? "Go on" : "To the download";
  show("start");
}

function next() {
  at = given.length;
  if (at < TOTAL) ask();
  else rest();
}

function ask() {
  const item = Math.floor(at / QUESTIONS.length);
  const { turns, answers } = items[item];
  byId("dialogue").replaceChildren(...turns.map(turn));
  byId("answer1").textContent = answers[0];
  byId("answer2").textContent = answers[1];
  byId("place").textContent = `Dialogue ${item + 1} of ${items.length}`;
  byId("progress").value = given.length;
  byId("back").disabled = at === 0;
  byId("more").textContent = QUESTIONS[at % QUESTIONS.length][1];
  for (const key of "120") byId(`choose${key}`).setAttribute("aria-pressed", String(given[at] === key));
  if (byId("ask").hidden || at % QUESTIONS.length === 0) show("ask");
  byId("question").focus({ preventScroll: true });
}

function turn([role, content]) {
  const box = document.createElement("div");
  const who = document.createElement("p");
  const text = document.createElement("div");
  box.className = "turn";
  who.className = "quiet";
  text.className = "text";
  text.dir = "auto";
  who.textContent = { user: "Person", assistant: "Program" }[role] ?? role;
  text.textContent = content;
  box.append(who, text);
  return box;
}

function choose(key) {
  given = given.slice(0, at) + key + given.slice(at + 1);
  keep();
  at += 1;
  if (at < TOTAL) ask();
  else rest();
}

function back() {
  if (at > 0) {
    at -= 1;
    ask();
    byId("dialogue").scrollIntoView({ block: "start" });
  }
}

function rest() {
  const finished = given.length === TOTAL;
  byId("rested").textContent = finished ? "That was all. Thank you!" : "Paused";
  byId("count").textContent = `${given.length} of ${TOTAL} questions are answered.`;
  byId("resume").textContent = finished ? "Look at the last one again" : "Go on";
  show("rest");
  byId("rested").focus();
}

function resume() {
  if (given.length < TOTAL) {
    next();
  } else {
    at = TOTAL - 1;
    ask();
  }
}

function csv() {
  const rows = [["version", "annotator", "item", "question", "verdict"]];
  [...given].forEach((key, number) => {
    const item = Math.floor(number / QUESTIONS.length) + 1;
    rows.push([version, annotator, item, QUESTIONS[number % QUESTIONS.length][0], key]);
  });
  return rows.map((row) => row.map((cell) => `"${String(cell).replaceAll('"', '""')}"`).join(",") + "\r\n").join("");
}

function download() {
  const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `annotator-${annotator}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  downloaded = given;
}

byId("begin").addEventListener("click", next);
byId("back").addEventListener("click", back);
byId("pause").addEventListener("click", rest);
byId("resume").addEventListener("click", resume);
byId("export").addEventListener("click", download);
for (const key of "120") byId(`choose${key}`).addEventListener("click", () => choose(key));
document.addEventListener("keydown", (event) => {
  // A key that is held down would answer everything that follows.
  if (byId("ask").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if ("120".includes(event.key) && event.key.length === 1) choose(event.key);
  else if (event.key === "Backspace") back();
  else return;
  event.preventDefault();
});
window.addEventListener("beforeunload", (event) => {
  if (!document.querySelector(".storage").hidden && given !== downloaded) event.preventDefault();
});
load();
start();
