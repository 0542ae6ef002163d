// Draws the plots of the report. All rows come from the page's own data; texts reach the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const at = (id) => document.getElementById(id);
const controls = { x: at("x"), y: at("y"), budget: at("budget"), zoom: at("zoom"), chosen: at("chosen") };
const trials = new Map(data.front.datasets.trials.map((trial) => [trial.key, trial]));
let chosen = data.chosen;

function theme() {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  const text = { labelColor: color("soft"), titleColor: color("ink"), labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: "transparent",
    font: "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
    view: { stroke: null },
    axis: { ...text, gridColor: color("line"), gridOpacity: 0.7, domainColor: color("line"), tickColor: color("line") },
    legend: { ...text, orient: "top", symbolStrokeWidth: 0, labelLimit: 320 },
    header: { labelColor: color("ink"), titleColor: color("ink"), labelFontSize: 13, labelAnchor: "start" },
    text: { color: color("ink"), fontSize: 11 },
    rule: { color: color("soft") },
    style: { halo: { stroke: color("ground"), strokeWidth: 4, strokeJoin: "round" } },
    range: {
      category: [1, 2, 3, 4, 5, 6, 7].map((number) => color(`c${number}`)),
      state: ["front", "within", "outside", "stopped"].map(color),
    },
  };
}

function draw(place, spec) {
  const options = {
    renderer: "svg",
    config: theme(),
    actions: { export: true, source: false, compiled: false, editor: false },
    downloadFileName: `secateur-${place.id.replace("chart-", "")}`,
  };
  return vegaEmbed(place, structuredClone(spec), options).then((result) => {
    place.view = result.view; // for downloads and tests
    return result.view;
  });
}

// A text of the template that is a placeholder becomes its value; the same as `filled` in front_chart.py.
function filled(template, tokens) {
  if (Array.isArray(template)) return template.map((value) => filled(value, tokens));
  if (template && typeof template === "object")
    return Object.fromEntries(Object.entries(template).map(([name, value]) => [name, filled(value, tokens)]));
  return typeof template === "string" && Object.hasOwn(tokens, template) ? tokens[template] : template;
}

function frontTokens() {
  const [x, y, budget] = [controls.x, controls.y, controls.budget].map((select) => Number(select.value));
  const tokens = {
    "@state": `s${budget}`,
    "@budget": data.front.budgets[budget],
    "@pair": `q${x}q${y}`,
    "@step": data.front.quantities[x].higher_is_better ? "step-before" : "step-after",
  };
  for (const [axis, index] of [["@x", x], ["@y", y]]) {
    const quantity = data.front.quantities[index];
    tokens[axis] = `q${index}`;
    tokens[`${axis}_high`] = `q${index}_high`;
    tokens[`${axis}_title`] = quantity.title;
    tokens[`${axis}_format`] = quantity.format;
    tokens[`${axis}_domain`] = controls.zoom.checked ? quantity.zooms[budget] : quantity.domain;
  }
  return tokens;
}

async function drawFront() {
  const spec = filled(data.front.template, frontTokens());
  const budget = data.front.budgets[Number(controls.budget.value)];
  const boxes = data.front.datasets.boxes.filter((box) => controls.budget.value === "0" || box.budget === budget);
  const points = spec.layer.find((layer) => layer.params);
  points.params[0].value = [{ key: chosen }];
  const place = at("chart-front");
  const height = place.clientWidth < 600 ? 340 : 460;
  const view = await draw(place, { ...spec, width: "container", height, datasets: { ...data.front.datasets, boxes } });
  view.addEventListener("click", (event, item) => {
    const key = item?.datum?.key;
    if (trials.has(key)) choose(key);
  });
}

// What a policy keeps of each layer; the same as `LayerView.rows` in layers.py.
function layerRows(run, number) {
  const levels = run.trials[number];
  const columns = { prune_ratio: [...run.widths], weight_bits: [...run.weight_bits], activation_bits: [...run.activation_bits] };
  const sensitivity = run.layers.map(() => 0);
  run.decisions.forEach((decision, index) => {
    columns[decision.kind][decision.target] = decision.levels[levels[index]];
    if (decision.sensitivity) sensitivity[decision.layer] += decision.sensitivity[levels[index]];
  });
  const shares = run.shares[number];
  return run.layers.map((layer, index) => {
    const channels = Math.round(layer.units.reduce((sum, [group, count]) => sum + count * columns.prune_ratio[group], layer.fixed));
    const row = {
      layer: layer.name,
      channels,
      dense_channels: layer.channels,
      kept: channels / layer.channels,
      weight_bits: columns.weight_bits[index],
      activation_bits: columns.activation_bits[index],
      sensitivity: run.measured ? sensitivity[index] : null,
    };
    (shares ?? []).forEach((share, cost) => (row[`c${cost}`] = share[index]));
    return row;
  });
}

function numeral(quantity, value) {
  const large = quantity.format.endsWith("s") ? { notation: "compact" } : {};
  return new Intl.NumberFormat("en", { maximumSignificantDigits: 4, ...large }).format(value);
}

function showFacts(trial) {
  const facts = at("facts");
  facts.replaceChildren();
  const values = data.front.quantities.map((quantity, index) => [quantity.title, numeral(quantity, trial[`q${index}`])]);
  const run = data.several ? [["run", trial.run]] : [];
  for (const [name, value] of [...run, ["evaluation", trial.evaluation], ...values, ["policy", trial.policy]]) {
    const pair = document.createElement("div");
    const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    detail.textContent = value;
    pair.append(term, detail);
    facts.append(pair);
  }
}

async function drawLayers() {
  const trial = trials.get(chosen);
  const [place, note] = [at("chart-layers"), at("layers-note")];
  if (!trial) return void (note.textContent = "There is no evaluated policy yet.");
  showFacts(trial);
  const run = data.layers[Number(chosen.split("/")[0])];
  if (!run) {
    place.replaceChildren();
    note.textContent = "The layers of this run are not known: an earlier version of secateur made it. `secateur resume RUN` records them.";
    return;
  }
  const shares = run.shares[trial.evaluation];
  note.textContent = shares ? "" : "Shares of costs are stored for policies on a front and for finalists.";
  await draw(place, { ...(shares ? run.spec : run.spec_without_shares), datasets: { layers: layerRows(run, trial.evaluation) } });
}

async function choose(key) {
  chosen = key;
  if (![...controls.chosen.options].some((option) => option.value === key)) {
    const trial = trials.get(key);
    controls.chosen.add(new Option(`${data.several ? `${trial.run}: ` : ""}policy ${trial.evaluation}`, key));
  }
  controls.chosen.value = key;
  await drawLayers();
}

async function drawAll() {
  await drawFront();
  await drawLayers();
  for (const [name, spec] of Object.entries(data.charts)) {
    const place = at(`chart-${name}`);
    const wide = spec.layer ? { width: "container" } : {};
    if (place) await draw(place, { ...spec, ...wide });
  }
  root.dataset.drawn = "true";
}

function setTheme(name) {
  root.dataset.theme = name;
}

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
controls.x.value = data.front.x;
controls.y.value = data.front.y;
controls.zoom.checked = data.front.zoom;
if (chosen) controls.chosen.value = chosen;
for (const name of ["x", "y", "budget", "zoom"]) controls[name].addEventListener("change", drawFront);
controls.chosen.addEventListener("change", async () => {
  await choose(controls.chosen.value);
  await drawFront();
});
at("theme").addEventListener("click", () => {
  setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  drawAll();
});
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
drawAll();
