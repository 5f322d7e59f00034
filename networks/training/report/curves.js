"use strict";
// Curves over steps. Every step is faint, the mean of the last steps bold; a value that is not finite is a gap.
const WINDOWS = [1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500];
const DASHES = ["solid", "dash", "dot", "dashdot"], MARKS = ["", "dashed", "dotted", "dashed"];
const KNOWN = [
  { title: "Loss", names: ["loss/current", "loss/validation"], smooth: true, tall: true },
  { title: "Learning rate", prefix: "lr/", hover: ".3~e" },
  { title: "Gradient norm", names: ["grad_norm"], smooth: true },
  { title: "Size of the updates", names: ["update/relative_norm"], note: "of the weights, at each save" },
  { title: "Seconds per step", names: ["seconds_per_step"], smooth: true, cut: true },
  { title: "Memory of the GPU", names: ["memory/peak_gib"], note: "highest so far, in GiB" },
  { title: "Memory of the process", names: ["memory/resident_gib"], note: "in GiB" },
];

function unpacked(text, Kind) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let index = 0; index < bytes.length; index++) bytes[index] = binary.charCodeAt(index);
  return new Kind(bytes.buffer);
}
const curves = runs.map(run => new Map(Object.entries(run.curves).map(([name, curve]) => {
  const values = unpacked(curve.values, Float32Array).map(value => Number.isFinite(value) ? value : NaN);
  return [name, { steps: unpacked(curve.steps, Int32Array), values }];
}).filter(([name, curve]) => curve.steps.length && name !== "loss/average")));

// The mean of the last finite values, at most `count` of them.
function means(values, count) {
  const finite = [], result = new Float32Array(values.length).fill(NaN);
  let sum = 0;
  values.forEach((value, index) => {
    if (Number.isNaN(value)) return;
    sum += value;
    finite.push(value);
    if (finite.length > count) sum -= finite[finite.length - 1 - count];
    result[index] = sum / Math.min(finite.length, count);
  });
  return result;
}

const names = [...new Set(curves.flatMap(each => [...each.keys()]))];
const charts = [];
for (const known of [...KNOWN, ...names.map(name => ({ title: name, names: [name] }))]) {
  const own = names.filter(name => known.prefix ? name.startsWith(known.prefix) : known.names.includes(name));
  if (own.some(name => charts.some(chart => chart.own.includes(name))) || !own.length) continue;
  charts.push({ limit: Infinity, ...known, own });
}
const shown = new Set(runs.keys());
const longest = Math.max(0, ...curves.flatMap(each => [...each.values()].map(curve => curve.steps.at(-1))));
let logarithmic = false, range = null;

const shortName = (chart, name) => name.slice(chart.prefix.length);
const windowSteps = () => WINDOWS[byId("window").value];
const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
// A colour of the style sheet as the browser resolves it now.
function color(value, alpha = 1) {
  const probe = document.body.appendChild(make("i"));
  probe.style.color = value;
  const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
  probe.remove();
  return `rgba(${red},${green},${blue},${alpha})`;
}

// Where a few steps are very long, as the first often is, the axis ends above the others and the mean leaves them out.
function cut(chart) {
  const values = curves.flatMap(each => [...each.get(chart.own[0])?.values ?? []]).filter(value => !Number.isNaN(value)).sort((a, b) => a - b);
  const limit = 1.5 * values[Math.floor(values.length * .98)];
  if (!(values.at(-1) > 2 * limit)) return;
  chart.limit = limit;
  chart.note = `longer ones, not shown: ${values.filter(value => value > limit).length.toLocaleString("en")}`;
}

function traces(chart) {
  const result = [];
  for (const number of shown) {
    chart.own.forEach((name, order) => {
      const curve = curves[number].get(name);
      if (!curve) return;
      const validation = name === "loss/validation";
      const hue = color(runColor(runs.length === 1 && validation ? 1 : number));
      const words = [runs.length > 1 ? escaped(runs[number].name).slice(0, 60) : "", chart.prefix ? escaped(shortName(chart, name)) : validation ? "validation" : ""];
      const label = words.filter(Boolean).join(" ");
      const trace = { x: curve.steps, type: "scatter", mode: "lines", hovertemplate: `%{y:${chart.hover ?? ".4~g"}}`, line: { color: hue, width: 2 } };
      if (chart.smooth && !validation) {
        const faint = color(runColor(number), longest < 1000 ? .45 : runs.length > 1 ? .2 : .3), steps = windowSteps();
        const every = { ...trace, y: curve.values, name: `${label} each step`.trim(), line: { color: faint, width: 1 } };
        if (steps === 1) return result.push({ ...every, line: { color: hue, width: 1 } });
        result.push(every, { ...trace, y: means(curve.values.map(value => value > chart.limit ? NaN : value), steps), name: `${label} mean`.trim() });
      } else {
        const few = curve.steps.length <= 200 && curve.steps.length * 2 < curve.steps.at(-1) - curve.steps[0] + 3;
        const dashed = { ...trace.line, dash: validation && runs.length > 1 ? "dot" : chart.prefix ? DASHES[order % 4] : "solid" };
        result.push({ ...trace, y: curve.values, name: label || chart.title.toLowerCase(), mode: few ? "lines+markers" : "lines", line: dashed, marker: { size: 6 } });
      }
    });
  }
  return result;
}

// From 0, but for losses from the lowest in view, to above the highest.
function yRange(chart, all) {
  const logs = chart.tall && logarithmic;
  let low = Infinity, high = -Infinity;
  for (const { x, y } of all) {
    y.forEach((value, index) => {
      if (!(value <= chart.limit) || (logs && value <= 0) || (range && (x[index] < range[0] || x[index] > range[1]))) return;
      low = Math.min(low, value);
      high = Math.max(high, value);
    });
  }
  if (low > high) return logs ? [-1, 0] : [0, 1];
  if (logs) return [Math.log10(low) - .05, Math.log10(high) + .05];
  const room = .05 * (chart.tall ? high - low || high : high) || 1;
  return [Math.min(low, chart.tall ? Math.max(0, low - room) : 0), high + Math.abs(room)];
}

function layout(chart, all) {
  const ink = color("var(--ink)"), quiet = color("var(--quiet)"), line = color("var(--line)"), raised = color("var(--raised)");
  const axis = { gridcolor: line, linecolor: line, zeroline: false, tickfont: { color: quiet } };
  const yaxis = { ...axis, type: chart.tall && logarithmic ? "log" : "linear", exponentformat: "e", minexponent: 2, nticks: chart.tall ? 8 : 5 };
  Object.assign(yaxis, { range: yRange(chart, all), fixedrange: true }); // the pointer zooms steps, and values follow
  return {
    autosize: true, showlegend: false, hovermode: "x unified", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    margin: { l: 54, r: 14, t: 10, b: 30 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
    hoverlabel: { bgcolor: raised, bordercolor: line, font: { color: ink } },
    xaxis: { ...axis, tickformat: ",d", hoverformat: ",d", nticks: 8, range: range ?? [0, longest * 1.01 + 1], unifiedhovertitle: { text: "step %{x}" } },
    yaxis,
  };
}
function draw(chart) {
  const all = traces(chart);
  Plotly.react(chart.plot, all, layout(chart, all), { displayModeBar: false, responsive: true, doubleClick: false, showTips: false });
}
const drawAll = () => charts.filter(chart => chart.drawn).forEach(draw);

function zoom(next) {
  range = next;
  hover(null, null);
  drawAll();
}

// One line through all charts at the step under the pointer.
let hovering = false;
function hover(source, step) {
  if (hovering) return;
  hovering = true;
  for (const chart of charts.filter(each => each.drawn && each !== source)) {
    step === null ? Plotly.Fx.unhover(chart.plot) : Plotly.Fx.hover(chart.plot, { xval: step }, ["xy"]);
  }
  hovering = false;
}

function key() {
  const steps = windowSteps().toLocaleString("en"), own = runs.length === 1;
  const marks = [["faint", "each step", 0], ["", `mean of ${steps} steps`, 0], ["points", "validation loss", 1]];
  if (windowSteps() === 1) marks.splice(0, 2, ["", "each step", 0]);
  if (!names.includes("loss/validation")) marks.pop();
  byId("curve-key").replaceChildren(...marks.map(([kind, text, number]) => {
    const mark = make("i", { className: `mark ${!own && kind === "points" ? "dotted" : kind}` });
    if (own) mark.style.setProperty("--mark", runColor(number));
    return make("span", {}, mark, text);
  }));
  byId("window-steps").textContent = `${steps} steps`;
  byId("window").ariaValueText = `${steps} steps`;
}

for (const chart of charts) {
  if (chart.cut) cut(chart);
  chart.plot = make("div", { className: "plot", role: "img", ariaLabel: `${chart.title} over ${longest.toLocaleString("en")} steps` });
  const caption = make("figcaption", {}, chart.title, make("span", {}, chart.note ?? ""));
  if (chart.prefix && chart.own.length > 1) {
    chart.own.forEach((name, order) => caption.append(make("span", {}, make("i", { className: `mark ${MARKS[order % 4]}` }), bdi(shortName(chart, name)))));
  }
  byId("charts").append(make("figure", { className: chart.tall ? "chart tall" : "chart" }, caption, chart.plot));
}
if (charts.length) {
  byId("window").value = WINDOWS.findLastIndex(each => each <= Math.max(10, longest / 20));
  byId("window").max = Math.max(2, WINDOWS.findLastIndex(each => each < Math.max(11, longest / 2)));
  key();
  // A chart is drawn when it comes near; the first at once.
  const near = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      const chart = charts.find(each => each.plot === target);
      if (!isIntersecting || chart.drawn) continue;
      chart.drawn = true;
      draw(chart);
      chart.plot.on("plotly_relayout", change => {
        if (change["xaxis.range[0]"] !== undefined) zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
      });
      chart.plot.on("plotly_doubleclick", () => zoom(null));
      chart.plot.on("plotly_hover", event => hover(chart, event.xvals?.[0] ?? event.points[0].x));
      chart.plot.on("plotly_unhover", () => hover(chart, null));
    }
  }, { rootMargin: "50px" });
  charts.forEach(chart => near.observe(chart.plot));
  byId("window").addEventListener("input", () => { key(); drawAll(); });
  byId("log").addEventListener("click", event => {
    logarithmic = !logarithmic;
    event.currentTarget.ariaPressed = String(logarithmic);
    drawAll();
  });
  byId("whole").addEventListener("click", () => zoom(null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  if (runs.length > 1) {
    byId("run-boxes").append(...runs.map((run, number) => {
      const box = make("input", { type: "checkbox", checked: true, ariaLabel: `curves of ${run.name}` });
      box.addEventListener("change", () => { box.checked ? shown.add(number) : shown.delete(number); drawAll(); });
      return make("label", {}, box, dot(number), bdi(run.name));
    }));
  }
}
runs.forEach((run, number) => {
  const steps = run.not_finite ?? [];
  if (!steps.length) return;
  const words = `numbers were not finite at ${steps.length.toLocaleString("en")} steps: ${steps.slice(0, 10).join(", ")}${steps.length > 10 ? ", ..." : ""}`;
  byId("charts").before(make("p", {}, make("span", { className: "warning" }, ...(runs.length > 1 ? [bdi(run.name), ": "] : []), words)));
});
byId("no-curves").hidden = charts.length > 0;
byId("curve-controls").hidden = !charts.length;
