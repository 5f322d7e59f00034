"use strict";
// Samples: rows of prompts, each with a map from step to sample for every run.
const prompts = new Map();
runs.forEach((run, number) => {
  const seen = new Map(); // prompts that stand more than once in the file of prompts stay apart
  for (const sample of [...run.samples].sort((a, b) => a.index - b.index || a.step - b.step)) {
    const indices = seen.get(sample.prompt) ?? seen.set(sample.prompt, []).get(sample.prompt);
    if (!indices.includes(sample.index)) indices.push(sample.index);
    const name = `${indices.indexOf(sample.index)} ${sample.prompt}`;
    if (!prompts.has(name)) prompts.set(name, { text: sample.prompt, runs: runs.map(() => new Map()) });
    prompts.get(name).runs[number].set(sample.step, sample);
  }
});
const lines = [...prompts.values()];
const stepsOf = [...new Set(runs.flatMap(run => run.samples.map(sample => sample.step)))].sort((a, b) => a - b);
const listed = entries => entries.map(([name, value]) => `${name} ${value}`).join(", ");
const everySample = runs.flatMap(run => run.samples);
const common = Object.entries(everySample[0]?.settings ?? {}).filter(([name, value]) => everySample.every(sample => sample.settings[name] === value));
const counted = number => number.toLocaleString("en");

function href(file) { // bytes of a name that are no UTF-8 come as halves of surrogates
  return "./" + file.split("/").map(part => [...part].map(character => {
    const code = character.codePointAt(0);
    if (code < 0xd800 || code > 0xdfff) return encodeURIComponent(character);
    return code >= 0xdc80 && code < 0xdd00 ? `%${(code - 0xdc00).toString(16)}` : "%3F";
  }).join("")).join("/");
}

// The player: one time for all clips in view. The longest leads, the others follow, shorter ones wait at their end.
const player = {
  playing: false, used: false, time: 0, share: null, videos: new Set(),
  get ready() { return [...this.videos].filter(video => video.readyState >= 1); },
  get leader() { return this.ready.reduce((best, video) => !best || video.duration > best.duration ? video : best, null); },
  play() {
    this.playing = this.used = true;
    this.share = null;
    inView.forEach(media => media.attach());
    for (const video of this.ready) this.join(video);
    this.show();
    requestAnimationFrame(() => this.tick());
  },
  pause() {
    this.playing = false;
    this.videos.forEach(video => video.pause());
    this.seek(this.leader?.currentTime ?? this.time);
  },
  seek(time) {
    this.time = time;
    this.used = true;
    inView.forEach(media => media.attach());
    for (const video of this.videos) if (video.readyState >= 1) video.currentTime = Math.min(time, video.duration);
    this.show();
  },
  join(video) {
    if (this.share !== null && this.leader) return this.seek(this.share * this.leader.duration); // the slider was moved before any clip was there
    video.currentTime = Math.min(this.time, video.duration);
    if (this.playing && this.time < video.duration) video.play().catch(() => {}); // taken out of view before it began
  },
  tick() {
    if (!this.playing) return;
    const leader = this.leader;
    if (leader?.ended) {
      this.time = 0;
      this.ready.forEach(video => this.join(video));
    } else if (leader) {
      this.time = leader.currentTime;
      for (const video of this.ready) {
        const late = this.time - video.currentTime;
        if (video === leader || video.ended || this.time >= video.duration) video.playbackRate = 1;
        else if (Math.abs(late) > .15) video.currentTime = this.time;
        else video.playbackRate = Math.min(2, Math.max(.5, 1 + 5 * late));
      }
    }
    this.show();
    requestAnimationFrame(() => this.tick());
  },
  show() {
    const duration = this.leader?.duration || 1;
    byId("play").textContent = this.playing ? "pause" : "play clips";
    byId("play").ariaPressed = String(this.playing);
    byId("time").value = 1000 * (this.share ?? this.time / duration);
    byId("time-text").textContent = `${this.time.toFixed(2)} s`;
    byId("time").ariaValueText = byId("time-text").textContent;
  },
};

// A place for a sample. Its picture is loaded when it comes into view, its clip when clips are used.
const inView = new Set(), places = new WeakMap(), ratios = new Map(); // width to height, by prompt
const watched = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    const media = places.get(target);
    isIntersecting ? media.enter() : media.leave();
  }
}, { rootMargin: "150px" });

class Media {
  constructor(tag = "div") {
    this.element = make(tag, { className: "media" });
    places.set(this.element, this);
    watched.observe(this.element);
  }
  show(sample) {
    this.sample = sample;
    this.detach();
    const shown = inView.has(this), ratio = ratios.get(sample?.prompt);
    if (ratio) this.element.style.setProperty("--ratio", ratio);
    if (!sample?.uri) {
      this.image = null;
      this.element.replaceChildren(make("span", { className: "quiet" }, sample ? "left out" : "no sample"));
    } else if (!this.image) {
      this.image = make("img", { alt: "" });
      this.image.addEventListener("load", event => {
        const ratio = event.target.naturalWidth / event.target.naturalHeight;
        ratios.set(this.sample.prompt, ratio);
        for (const element of [this.element, this.element.closest("tr")]) element?.style.setProperty("--ratio", ratio);
      });
      this.element.replaceChildren(this.image);
    }
    if (shown) this.enter();
    return this;
  }
  enter() {
    inView.add(this);
    if (this.image && this.image.src !== this.sample.uri) this.image.src = this.sample.uri;
    if (player.used) this.attach();
  }
  leave() {
    inView.delete(this);
    this.detach();
  }
  attach() {
    if (this.video || !this.sample?.clip) return;
    const video = this.video = make("video", { src: this.sample.clip, muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
    video.tabIndex = -1;
    video.addEventListener("loadedmetadata", () => { if (this.video === video) player.join(video); }, { once: true });
    this.element.append(video);
    player.videos.add(video);
  }
  detach() {
    if (!this.video) return;
    player.videos.delete(this.video);
    this.video.removeAttribute("src");
    this.video.load();
    this.video.remove();
    this.video = null;
  }
  drop() {
    watched.unobserve(this.element);
    this.leave();
  }
}

// A sample with what is known about it.
class Figure {
  constructor(head) {
    this.media = new Media();
    this.caption = make("figcaption");
    this.element = make("figure", { className: "sample" }, ...(head ? [make("h3", {}, head)] : []), this.media.element, this.caption);
  }
  show(sample, prompt) {
    this.media.show(sample);
    const parts = prompt ? [make("p", {}, bdi(prompt))] : [];
    if (sample) {
      const own = Object.entries(sample.settings).filter(([name]) => !common.some(([shared]) => shared === name));
      parts.push(make("p", { className: "quiet" }, bdi(listed([["step", counted(sample.step)], ["seed", sample.seed], ...own]))));
      parts.push(make("p", {}, make("a", { href: href(sample.file) }, bdi(sample.file.split("/").at(-1)))));
    }
    this.media.element.setAttribute("role", "img");
    this.media.element.ariaLabel = sample ? `${sample.prompt}, step ${sample.step}` : "no sample";
    this.caption.replaceChildren(...parts);
  }
}

// All steps: a cell is one stop for the tab key, arrow keys move among them.
function fillGrid() {
  const matrix = [], table = make("table");
  const heads = [make("th", { scope: "col" }, "prompt"), ...stepsOf.map(step => make("th", { scope: "col" }, `step ${counted(step)}`))];
  table.createTHead().append(make("tr", {}, ...heads));
  const body = table.createTBody();
  for (const line of lines) {
    if (runs.length > 1) {
      body.append(make("tr", { className: "prompt-row" }, make("th", { colSpan: stepsOf.length + 1, scope: "rowgroup" }, bdi(line.text))));
    }
    line.runs.forEach((samples, number) => {
      if (!samples.size) return;
      const head = make("th", { scope: "row" }, runs.length > 1 ? runName(number) : make("bdi", { className: "clamp", title: line.text }, line.text));
      const cells = stepsOf.map(step => {
        const sample = samples.get(step);
        if (!sample) return make("td");
        const cell = make("button", { type: "button", className: "cell", tabIndex: -1 }, new Media("span").show(sample).element);
        cell.ariaLabel = `step ${step}, ${runs.length > 1 ? `${runs[number].name}, ` : ""}${line.text}`;
        cell.addEventListener("click", () => openStep(step));
        return make("td", {}, cell);
      });
      const row = make("tr", {}, head, ...cells);
      matrix.push(cells.map(cell => cell.firstChild));
      body.append(row);
    });
  }
  const all = matrix.flat().filter(Boolean);
  all[0].tabIndex = 0;
  table.addEventListener("focusin", event => {
    if (!event.target.matches(".cell")) return;
    all.forEach(cell => { cell.tabIndex = cell === event.target ? 0 : -1; });
  });
  table.addEventListener("keydown", event => {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (!event.target.matches(".cell") || (!down && !right)) return;
    event.preventDefault();
    let row = matrix.findIndex(cells => cells.includes(event.target)), column = matrix[row].indexOf(event.target);
    do { row += down; column += right; } while (matrix[row] && column in matrix[row] && !matrix[row][column]);
    matrix[row]?.[column]?.focus();
  });
  byId("view-grid").append(table);
  byId("view-grid").scrollLeft = table.scrollWidth;
}

// One step: all prompts, large. The places stay, so that nothing flickers while the slider moves.
let figures = null;
function fillStep() {
  byId("step").max = stepsOf.length - 1;
  figures = lines.map(line => line.runs.map((_, number) => new Figure(runs.length > 1 ? runName(number) : null)));
  if (runs.length > 1) {
    byId("step-samples").append(...lines.flatMap((line, index) => [
      make("h3", {}, bdi(line.text)), make("div", { className: "pictures runs" }, ...figures[index].map(figure => figure.element)),
    ]));
  } else {
    byId("step-samples").append(make("div", { className: "pictures" }, ...figures.flat().map(figure => figure.element)));
  }
}
function showStep() {
  const step = stepsOf[byId("step").value], text = `${counted(step)} of ${counted(stepsOf.at(-1))}`;
  byId("step-text").textContent = text;
  byId("step").ariaValueText = text;
  lines.forEach((line, index) => line.runs.forEach((samples, number) => figures[index][number].show(samples.get(step), runs.length > 1 ? "" : line.text)));
}
function openStep(step) {
  byId("step").max = stepsOf.length - 1;
  byId("step").value = stepsOf.indexOf(step);
  view("step");
  byId("step").focus();
}

// Two samples side by side.
let sides = null;
function fillPair() {
  const choice = (words, chosen, label) => {
    const select = make("select", {}, ...words.map((text, index) => new Option(text, index, index === chosen, index === chosen)));
    return [select, make("label", { hidden: words.length < 2 }, label, select)];
  };
  const short = text => text.length > 90 ? `${text.slice(0, 90)}...` : text;
  const several = runs.length > 1, last = stepsOf.findLastIndex(step => lines[0].runs.every(samples => samples.has(step)));
  sides = [0, 1].map(side => {
    const [run, runLabel] = choice(runs.map(each => each.name), several ? side : 0, "run");
    const [prompt, promptLabel] = choice(lines.map(line => short(line.text)), 0, "prompt");
    const [step, stepLabel] = choice(stepsOf.map(counted), several || side ? Math.max(0, last) : 0, "step");
    const figure = new Figure(), name = side ? "right" : "left";
    const show = () => {
      const line = lines[prompt.value];
      figure.show(line.runs[run.value].get(stepsOf[step.value]), line.text);
    };
    [run, prompt, step].forEach(select => select.addEventListener("change", show));
    const choices = make("div", { className: "sides" }, runLabel, promptLabel, stepLabel);
    choices.setAttribute("role", "group");
    choices.ariaLabel = name;
    return { show, element: make("div", {}, choices, figure.element) };
  });
  byId("view-pair").append(make("div", { className: "pair" }, ...sides.map(side => side.element)));
}

function view(name) {
  for (const button of document.querySelectorAll("[data-view]")) {
    button.ariaPressed = String(button.dataset.view === name);
    byId(`view-${button.dataset.view}`).hidden = button.dataset.view !== name;
  }
  if (name === "step") { if (!figures) fillStep(); showStep(); }
  if (name === "pair") { if (!sides) fillPair(); sides.forEach(side => side.show()); }
}

if (lines.length) {
  const left = everySample.filter(sample => !sample.uri).length;
  byId("sample-parts").hidden = false;
  byId("player").hidden = !everySample.some(sample => sample.clip);
  byId("common").textContent = common.length ? `all samples: ${listed(common)}` : "";
  byId("left-out").hidden = !left;
  byId("left-out").textContent = `${counted(left)} of ${counted(everySample.length)} samples are left out to keep this page small, or could not be read. Their files are in the folder of samples.`;
  byId("step").value = 0;
  fillGrid();
  document.querySelectorAll("[data-view]").forEach(button => button.addEventListener("click", () => view(button.dataset.view)));
  byId("step").addEventListener("input", showStep);
  byId("play").addEventListener("click", () => player.playing ? player.pause() : player.play());
  byId("time").addEventListener("input", () => {
    if (player.playing) player.pause();
    player.share = byId("time").value / 1000;
    player.seek(player.share * (player.leader?.duration ?? 0));
  });
} else {
  byId("no-samples").hidden = false;
}
