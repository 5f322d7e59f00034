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
  document.getElementById("nothing").hidden = shown > 0;
  for (const field of [group, concern]) field.classList.toggle("on", Boolean(field.value));
  count.textContent = `${shown} of ${total} files`;
  for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.concern === concern.value);
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    concern.value = concern.value === button.dataset.concern ? "" : button.dataset.concern;
    filter();
    if (concern.value) document.querySelector(".groups").scrollIntoView();
  });
}
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
filter();

const larger = document.getElementById("larger"), [model, whole] = larger.querySelectorAll("figure");

function enlarge(item, row) {
  larger.querySelector("h2").replaceChildren(...item.querySelector("h4").cloneNode(true).childNodes);
  const overview = item.querySelector(".whole > div");
  if (row) put(model, row.querySelector("img"), row.dataset.clip);
  if (overview) put(whole, overview.querySelector("img"), null, overview.querySelector("i"));
  larger.showModal();
}

function put(figure, still, clip, kept) { // at twice its size, if that fits
  const box = document.createElement("div"), { naturalWidth: width, naturalHeight: height } = still;
  const shown = clip ? document.createElement("video") : still.cloneNode();
  if (clip) Object.assign(shown, { src: clip, muted: true, loop: true, autoplay: true, playsInline: true, controls: true });
  box.style.width = `min(${2 * width}px, ${75 * width / height}vh)`;
  shown.style.width = "100%";
  box.append(shown);
  if (kept) box.append(kept.cloneNode());
  figure.append(box);
}

document.addEventListener("click", (event) => {
  const picture = event.target.closest(".row, .whole"), item = event.target.closest(".item");
  if (picture) enlarge(item, event.target.closest(".row") ?? item.querySelector(".row"));
  const link = event.target.closest("a[href^='#item-']");
  if (link && document.querySelector(link.hash).closest("[hidden]")) { // before the browser goes there
    form.reset();
    filter();
  }
  if (event.target === larger || event.target.closest("dialog button")) larger.close();
});
larger.addEventListener("close", () => [model, whole].forEach((figure) => figure.querySelector("div")?.remove()));
