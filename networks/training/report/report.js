"use strict";
const runs = JSON.parse(document.getElementById("runs").textContent);
const byId = id => document.getElementById(id);

// An element with properties and children. Text of records gets into the page through here alone, and stays text.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}
const bdi = text => make("bdi", {}, text);
const runColor = number => `var(--run-${number % 8})`;
function dot(number) {
  const mark = make("i", { className: "dot", ariaHidden: "true" });
  mark.style.setProperty("--run", runColor(number));
  return mark;
}
const runName = number => make("span", { className: "run-name" }, dot(number), bdi(runs[number].name));

for (const mark of document.querySelectorAll(".dot[data-run]")) mark.style.setProperty("--run", runColor(mark.dataset.run));

// Settings: rows that hold the text, and of several runs those that differ.
const rows = [...byId("settings").tBodies[0].rows];
function filterSettings() {
  const text = byId("filter").value.trim().toLowerCase(), differing = byId("differing")?.checked;
  for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(text) || (differing && row.className !== "differs");
  byId("filter-count").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
}
byId("filter").addEventListener("input", filterSettings);
byId("differing")?.addEventListener("change", filterSettings);
filterSettings();
