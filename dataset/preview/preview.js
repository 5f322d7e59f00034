"use strict";
const form = document.getElementById("filters"), count = document.getElementById("count");
const group = document.getElementById("group"), concern = document.getElementById("concern"), text = document.getElementById("text");
const buttons = [...document.querySelectorAll("button[data-concern]")];
const sections = [...document.querySelectorAll(".group")].map((section) => ({
  section,
  number: section.querySelector("h3 span"),
  items: [...section.querySelectorAll(".item")].map((element) => ({
    element, group: element.dataset.group, concerns: element.dataset.concerns.split(" "), words: null,
  })),
}));
const total = sections.reduce((sum, { items }) => sum + items.length, 0);

function wordsOf(item) { // read when first asked for
  item.words ??= ["h4", ".caption"].map((part) => item.element.querySelector(part)?.textContent ?? "").join("\n").toLowerCase();
  return item.words;
}

function fits(item, words) {
  if (group.value && item.group !== group.value) return false;
  if (concern.value === "any" ? !item.concerns[0] : concern.value && !item.concerns.includes(concern.value)) return false;
  return words.every((word) => wordsOf(item).includes(word));
}

function filter() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const { section, number, items } of sections) {
    let here = 0;
    for (const item of items) {
      item.element.hidden = !fits(item, words);
      here += !item.element.hidden;
    }
    section.hidden = !here;
    number.textContent = here < items.length ? `${here} of ${items.length}` : items.length;
    shown += here;
  }
  count.textContent = `${shown} of ${total} files`;
  for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.concern === concern.value);
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    concern.value = concern.value === button.dataset.concern ? "" : button.dataset.concern;
    filter();
    if (concern.value) document.getElementById("files").scrollIntoView();
  });
}
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
filter();
