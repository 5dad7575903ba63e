"use strict";
// Names of classes and files are put in as text only, never as HTML.
const report = JSON.parse(document.getElementById("report").textContent);
const gallery = JSON.parse(document.getElementById("images").textContent);
const $ = (selector, root = document) => root.querySelector(selector);
const ERRORS = report.error_types, MISSED = ERRORS.indexOf("missed");
const COLORS = { classification: "#ff9d1e", localisation: "#f5e02a", both: "#b06cf5", duplicate: "#35a7ff", background: "#ff4f4f", missed: "#ff5fd0", right: "#37d67a", object: "#ffffff" };
const MEANINGS = {
  classification: "the place is right, the class is another",
  localisation: "the class is right, the place is not: IoU between 0.1 and 0.5",
  both: "another class, and not well placed",
  duplicate: "a second detection of an object that is found already",
  background: "there is no object",
  missed: "nothing was found there, and none of the other errors is about it",
  right: "right", object: "object in the annotations",
};
const state = { task: Object.keys(report.tasks)[0], score: 0, list: [], shown: 0, open: -1, detector: 0 };
const CHUNK = 24;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element && key !== "list") element[key] = value; else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
const percent = (value, digits = 1) => value == null ? "–" : (100 * value).toFixed(digits);
const points = (value, digits = 1) => value == null ? "–" : value.toFixed(digits);
const color = k => { const c = gallery.colors[k % gallery.colors.length]; return `rgb(${c})`; };
const numbers = () => report.tasks[state.task];
const drawn = () => gallery.tasks[state.task].drawn[Math.min(state.detector, gallery.tasks[state.task].drawn.length - 1)];

// ---- tables

function table(root, columns, rows, onRow) {
  // columns: {name, value(row), show(row), text, title}; a click on a head sorts, falling first.
  root.replaceChildren();
  const body = make("tbody");
  const fill = ordered => body.replaceChildren(...ordered.map(row => {
    const line = make("tr", onRow && onRow(row) ? { className: "link", tabIndex: 0 } : {});
    if (onRow && onRow(row)) { line.onclick = onRow(row); line.onkeydown = e => { if (e.key === "Enter") onRow(row)(); }; }
    for (const column of columns) {
      const cell = make("td", column.text ? { className: "text" } : {});
      const content = column.show ? column.show(row) : column.value(row);
      cell.append(content == null ? "–" : content);
      line.append(cell);
    }
    return line;
  }));
  const heads = columns.map(column => {
    const head = make("th", { title: column.title || "", className: column.text ? "text" : "" });
    const button = make("button", { type: "button" }, column.name);
    button.onclick = () => {
      const rising = head.getAttribute("aria-sort") === "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const sign = rising ? 1 : -1;
      fill([...rows].sort((a, b) => {
        const x = column.value(a), y = column.value(b);
        if (x == null || y == null) return (x == null) - (y == null);  // what is unknown comes last
        return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
      }));
    };
    head.append(button);
    return head;
  });
  root.append(make("thead", {}, make("tr", {}, ...heads)), body);
  fill(rows);
}

function swatch(name) { const s = make("span", { className: "swatch" }); s.style.background = name; return s; }

// ---- sections

function headline() {
  const n = numbers(), at = n.at_threshold;
  const cards = [["AP", points(n.metrics.AP), `mean over classes and IoU thresholds; 95 % interval over images: ${points(n.interval[0])} – ${points(n.interval[1])}`]];
  const names = { AP50: "finding objects, IoU 0.5 is enough", AP75: "placing them well, IoU 0.75" };
  for (const [name, value] of Object.entries(n.metrics)) {
    if (name === "AP") continue;
    const size = n.breakdown.find(row => row.by === "size" && (name === "AP" + row.name[0] || name === "AP_" + row.name));
    cards.push([name, points(value), names[name] || (size ? `${size.name} objects, ${size.meaning}: ${size.objects}` : "")]);
  }
  cards.push(["Precision", percent(at.precision), `of detections that are right, with scores from ${n.threshold.toFixed(2)}`]);
  cards.push(["Recall", percent(at.recall), `of objects that are found, with scores from ${n.threshold.toFixed(2)}`]);
  $("#headline .cards").replaceChildren(...cards.map(([name, value, meaning]) => make("div", {}, name, make("b", {}, value), make("small", {}, meaning))));
}

function suggestionList() {
  const found = numbers().suggestions;
  $("#suggestions ol").replaceChildren(...found.map(s => {
    const item = make("li", {}, s.text, ". ", make("small", {}, s.evidence + ". "));
    s.keys.forEach(key => item.append(make("code", {}, key), " "));
    return item;
  }));
  if (!found.length) $("#suggestions ol").append(make("li", {}, "Nothing stands out."));
}

function errorTable() {
  const n = numbers().errors, rows = Object.entries(n.types).map(([name, row]) => ({ name, ...row }));
  const most = Math.max(1e-9, ...rows.map(row => row.cost));
  table($("#errors table"), [
    { name: "error", value: r => r.name, show: r => make("span", {}, swatch(COLORS[r.name]), r.name) },
    { name: `AP${Math.round(100 * numbers().iou_threshold)} it costs`, value: r => r.cost, show: r => { const bar = make("span", { className: "bar" }); bar.style.cssText = `width:${Math.round(110 * r.cost / most)}px;background:${COLORS[r.name]}`; return make("span", {}, bar, points(r.cost)); } },
    { name: "number", value: r => r.count },
    { name: "meaning", value: r => MEANINGS[r.name], text: true },
  ], rows, row => () => { $("#gallery [name=error]").value = ERRORS.indexOf(row.name); relist(); $("#gallery").scrollIntoView(); });
}

function classTable() {
  const n = numbers();
  $("#classes .note").textContent = `Precision, recall and F1 are those of detections with scores from ${n.threshold.toFixed(2)}, at IoU ${n.iou_threshold}. The interval holds 95 % of ${report.num_samples} resamplings of the images: differences within it may be chance.`;
  table($("#classes table"), [
    { name: "class", value: r => r.name, show: r => make("span", {}, swatch(color(n.classes.indexOf(r))), r.name) },
    { name: "objects", value: r => r.objects }, { name: "AP", value: r => r.AP, show: r => points(r.AP) },
    { name: "95 % interval", value: r => r.AP_high == null ? null : r.AP_high - r.AP_low, show: r => r.AP_low == null ? null : `${points(r.AP_low)} – ${points(r.AP_high)}` },
    { name: "AP50", value: r => r.AP50, show: r => points(r.AP50) },
    { name: "precision", value: r => r.precision, show: r => percent(r.precision) },
    { name: "recall", value: r => r.recall, show: r => percent(r.recall) },
    { name: "F1", value: r => r.f1, show: r => percent(r.f1) },
    { name: "best score", title: "score at which the F1 of this class is highest", value: r => r.best_threshold, show: r => points(r.best_threshold, 2) },
    { name: "best F1", value: r => r.best_f1, show: r => percent(r.best_f1) },
  ], n.classes, row => () => { $("#gallery [name=class]").value = n.classes.indexOf(row); relist(); $("#gallery").scrollIntoView(); });
}

function confusionTable() {
  const n = numbers(), { labels, matrix } = n.confusion, root = $("#confusion table");
  $("#confusion .note").textContent = `Rows: objects. Columns: what they were taken for, with scores from ${n.threshold.toFixed(2)}. The last column holds missed objects, the last row detections where there is no object. Colour: share of the row.`;
  const head = make("tr", {}, make("th"), ...labels.map(label => make("th", {}, label)), make("th", {}, "recall"));
  const rows = matrix.map((row, i) => {
    const total = row.reduce((a, b) => a + b, 0);
    const cells = row.map(value => {
      const cell = make("td", { className: "hot" }, value ? String(value) : "");
      cell.style.background = `rgba(var(--heat), ${total ? 0.75 * value / total : 0})`;
      return cell;
    });
    return make("tr", {}, make("td", {}, labels[i]), ...cells, make("td", {}, i < labels.length - 1 ? percent(total ? row[i] / total : null) : ""));
  });
  root.replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

function breakdownTable() {
  table($("#breakdown table"), [
    { name: "objects that are", value: r => r.by + " " + r.name, show: r => r.name },
    { name: "by", value: r => r.by }, { name: "objects", value: r => r.objects },
    { name: "AP", value: r => r.AP, show: r => points(r.AP) }, { name: "AP50", value: r => r.AP50, show: r => points(r.AP50) },
    { name: "recall", value: r => r.recall, show: r => points(r.recall) },
    { name: "meaning", value: r => r.meaning, text: true },
  ], numbers().breakdown);
}

function comparison() {
  const compare = numbers().compare;
  $("#comparison").hidden = !compare;
  if (!compare) return;
  const better = compare.images.filter(i => i.change < 0).length, worse = compare.images.filter(i => i.change > 0).length;
  $("#comparison .note").textContent = `Second: ${report.names.second}. ${better} images have fewer errors with it, ${worse} more; the gallery can be ordered by that. An interval that holds 0 means: may be chance.`;
  table($("#comparison table"), [
    { name: "class", value: r => r.name }, { name: "first AP", value: r => r.first, show: r => points(r.first) },
    { name: "second AP", value: r => r.second, show: r => points(r.second) },
    { name: "difference", value: r => r.difference, show: r => make("span", { className: r.low > 0 ? "better" : r.high < 0 ? "worse" : "" }, (r.difference > 0 ? "+" : "") + points(r.difference)) },
    { name: "95 % interval", value: r => r.low, show: r => r.low == null ? null : `${points(r.low)} – ${points(r.high)}` },
  ], compare.classes);
}

// ---- curves

let charts = [];
function chart(root, xs, series, xLabel) {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--soft"), line = getComputedStyle(document.documentElement).getPropertyValue("--line");
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
  const value = (u, v) => v == null ? "–" : v.toFixed(2);
  const plot = new uPlot({
    width: root.clientWidth || 320, height: 260, scales: { x: { time: false, range: [0, 1] }, y: { range: [0, 1.01] } },
    axes: [{ ...axis, label: xLabel, labelSize: 20 }, { ...axis, size: 42 }],
    series: [{ label: xLabel, value }, ...series.map(s => ({ label: s.label, stroke: s.stroke, width: s.width || 1.5, dash: s.dash, value, points: { show: !!s.points, size: 6 } }))],
  }, [xs, ...series.map(s => s.values)], root);
  charts.push([plot, root]);
}

function mean(lists) {
  return lists[0].map((_, i) => {
    const known = lists.map(list => list[i]).filter(v => v != null);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  });
}

function curves() {
  const n = numbers(), c = n.curves, select = $("#curves select"), few = n.classes.length <= 12;
  if (select.options.length === 0) {
    select.append(make("option", { value: -1 }, few ? "all" : "mean only"), ...n.classes.map((row, k) => make("option", { value: k }, row.name)));
    select.onchange = curves;
  }
  charts.forEach(([plot]) => plot.destroy());
  charts = [];
  const chosen = Number(select.value), known = n.classes.map((_, k) => k).filter(k => n.classes[k].objects);
  const shown = known.filter(k => chosen < 0 ? few : k === chosen), roots = document.querySelectorAll("#curves figure div");
  roots.forEach(root => root.replaceChildren());
  const lines = get => {
    const list = shown.map(k => ({ label: n.classes[k].name, stroke: color(k), values: get(c.classes[k]) }));
    if (known.length > 1) list.unshift({ label: "mean", stroke: getComputedStyle(document.documentElement).getPropertyValue("--ink"), width: 2.5, values: mean(known.map(k => get(c.classes[k]))) });
    return list;
  };
  if (known.length) {
    chart(roots[0], c.recalls, lines(curve => curve.precision_at_recall), "recall");
    chart(roots[1], c.scores, lines(curve => curve.f1), "score");
  }
  const bins = n.calibration.bins.filter(bin => bin.detections);
  const xs = bins.map(bin => bin.mean_score);
  if (bins.length) chart(roots[2], xs, [
    { label: "precision", stroke: COLORS.duplicate, width: 2, points: true, values: bins.map(bin => bin.precision) },
    { label: "perfect", stroke: "#888", dash: [4, 4], values: xs }], "score");
}

// ---- gallery

function judged(i, score = state.score) {
  // What counts at a score in an image: indices of wrong and right detections, and missed objects.
  const { objects, detections } = drawn()[i], result = { wrong: [], right: [], missed: [] };
  detections.score.forEach((s, j) => { if (s >= score && detections.error[j] !== -2) (detections.error[j] < 0 ? result.right : result.wrong).push(j); });
  objects.found.forEach((s, j) => { if (!objects.ignored[j] && s < score) result.missed.push(j); });
  return result;
}

function chosenErrors(i) {
  const form = $("#gallery form"), kind = Number(form.error.value), k = Number(form.class.value), size = Number(form.size.value);
  const { objects, detections } = drawn()[i], { wrong, missed } = judged(i);
  const fits = (items, j) => (k < 0 || items.class[j] === k) && (size < 0 || items.size[j] === size);
  return wrong.filter(j => fits(detections, j) && (kind < 0 || detections.error[j] === kind)).length
    + missed.filter(j => fits(objects, j) && (kind < 0 || kind === MISSED)).length;
}

// Errors of the second detector less those of the first, at the score of the report, by image.
const changes = () => new Map((numbers().compare ? numbers().compare.images : []).map(row => [row.image_id, row.change]));

function relist() {
  const form = $("#gallery form"), filtered = [form.class, form.error, form.size].some(s => Number(s.value) >= 0);
  const counts = gallery.images.map((_, i) => chosenErrors(i));
  let list = gallery.images.map((_, i) => i).filter(i => !filtered || counts[i]);
  const position = new Map(numbers().images.map((row, index) => [row.image_id, index]));
  if (form.order.value === "worst") list.sort((a, b) => counts[b] - counts[a] || position.get(gallery.images[a].id) - position.get(gallery.images[b].id));
  if (form.order.value === "file") list.sort((a, b) => gallery.images[a].file.localeCompare(gallery.images[b].file));
  if (form.order.value === "worse" || form.order.value === "better") {
    const sign = form.order.value === "worse" ? -1 : 1, change = changes();
    list.sort((a, b) => sign * (change.get(gallery.images[a].id) - change.get(gallery.images[b].id)));
  }
  const keep = Math.max(CHUNK, state.shown);
  state.list = list;
  state.shown = 0;
  seen.disconnect();
  $("#pictures").replaceChildren();
  append(keep);
  summary();
}

function summary() {
  let wrong = 0, right = 0, missed = 0;
  for (const i of state.list) { const j = judged(i); wrong += j.wrong.length; right += j.right.length; missed += j.missed.length; }
  const all = gallery.images.length === report.num_images ? "" : ` (the page holds the ${gallery.images.length} with most errors of ${report.num_images})`;
  $("#count").textContent = `${state.list.length} images${all}: ${right} right detections, ${wrong} wrong, ${missed} missed objects`;
  document.querySelectorAll("output").forEach(output => { output.textContent = state.score.toFixed(2); });
  document.querySelectorAll("input[type=range]").forEach(input => { input.value = state.score; });
}

// Cards are made a screen at a time, and drawn when they come near: thousands stay smooth.
const seen = new IntersectionObserver(entries => entries.forEach(({ target, isIntersecting }) => {
  target.near = isIntersecting;
  const canvas = $("canvas", target);
  if (isIntersecting) drawCard(target);
  else if (canvas) canvas.width = canvas.height = 0;  // a thousand would take half a gigabyte
}), { rootMargin: "300px" });
new IntersectionObserver(entries => { if (entries[0].isIntersecting) append(CHUNK); }, { rootMargin: "600px" }).observe($("#more"));

function append(count) {
  const next = state.list.slice(state.shown, state.shown + count);
  state.shown += next.length;
  $("#pictures").append(...next.map(i => {
    const image = gallery.images[i], stage = make("div", { className: "stage" });
    stage.style.aspectRatio = `${image.width || 4} / ${image.height || 3}`;
    const button = make("button", { type: "button", ariaLabel: `enlarge ${image.file}` }, stage);
    button.onclick = () => enlarge(state.list.indexOf(i));
    const card = make("figure", { className: "picture" }, button, make("figcaption"));
    card.index = i;
    seen.observe(card);
    return card;
  }));
}

function drawCard(card) {
  const image = gallery.images[card.index], { wrong, missed } = judged(card.index);
  draw($(".stage", card), card.index, 1);
  const change = changes().get(image.id), more = change ? ` (${change > 0 ? "+" : ""}${change} with the second)` : "";
  $("figcaption", card).textContent = `${wrong.length} wrong, ${missed.length} missed${more} · ${image.file}`;
  $("figcaption", card).title = image.file;
}

function draw(stage, i, labels) {
  const image = gallery.images[i];
  if (!stage.firstChild) {
    stage.append(image.picture ? make("img", { src: image.picture, alt: image.file, decoding: "async" }) : make("p", {}, "no picture: the file could not be read"), make("canvas"));
  }
  const canvas = $("canvas", stage), ratio = window.devicePixelRatio || 1;
  const width = Math.round(stage.clientWidth * ratio), height = Math.round(stage.clientHeight * ratio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), scale = canvas.width / (image.width || canvas.width);
  const { objects, detections } = drawn()[i], { wrong, right, missed } = judged(i), form = $("#gallery form");
  context.clearRect(0, 0, width, height);
  let count = 0;
  const shape = (items, j, stroke, dash, label) => {
    const [x, y, w, h] = items.box[j].map(v => v * scale);
    context.strokeStyle = context.fillStyle = stroke;
    context.lineWidth = 1.75 * ratio;
    context.setLineDash(dash ? [5 * ratio, 4 * ratio] : []);
    if (items.outlines) {
      const path = new Path2D();
      for (const outline of items.outlines[j]) {
        for (let p = 0; p < outline.length; p += 2) path[p ? "lineTo" : "moveTo"](outline[p] * scale, outline[p + 1] * scale);
        path.closePath();
      }
      context.globalAlpha = dash ? 0.15 : 0.3;
      context.fill(path, "evenodd");
      context.globalAlpha = 1;
      context.stroke(path);
    } else context.strokeRect(x, y, w, h);
    if (items.keypoints) {
      const k = items.keypoints[j], at = n => [k[3 * n] * scale, k[3 * n + 1] * scale], on = n => k[3 * n + 2] > 0;
      context.setLineDash([]);
      for (const [a, b] of gallery.skeleton) if (on(a) && on(b)) { context.beginPath(); context.moveTo(...at(a)); context.lineTo(...at(b)); context.stroke(); }
      for (let n = 0; n < k.length / 3; n++) if (on(n)) { context.beginPath(); context.arc(...at(n), 2.5 * ratio, 0, 7); context.fill(); }
    }
    if (label && labels > 1) {
      context.font = `${12 * ratio}px system-ui, sans-serif`;
      const width = context.measureText(label).width + 6 * ratio, top = Math.max(0, y - 16 * ratio);
      context.fillRect(Math.min(x, canvas.width - width), top, width, 16 * ratio);
      context.fillStyle = "#000";
      context.fillText(label, Math.min(x, canvas.width - width) + 3 * ratio, top + 12 * ratio);
    }
    count++;
  };
  const name = k => numbers().classes[k].name, text = j => `${name(detections.class[j])} ${detections.score[j].toFixed(2)}`;
  if (form.objects.checked) objects.box.forEach((_, j) => shape(objects, j, COLORS.object, true, ""));
  if (form.right.checked) right.forEach(j => shape(detections, j, COLORS.right, false, text(j)));
  missed.forEach(j => shape(objects, j, COLORS.missed, true, "missed " + name(objects.class[j])));
  wrong.forEach(j => shape(detections, j, COLORS[ERRORS[detections.error[j]]], false, text(j)));
  canvas.dataset.boxes = count;
}

let pending = 0;
function soon(work) {  // once per frame, however fast the slider moves
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(work);
}

function redraw() {
  document.querySelectorAll(".picture").forEach(card => { if (card.near) drawCard(card); });
  summary();
  if ($("dialog").open) fillDialog();
}

function enlarge(position) {
  state.open = position;
  if (!$("dialog").open) $("dialog").showModal();
  $("dialog .stage").replaceChildren();
  fillDialog();
}

function fillDialog() {
  const i = state.list[state.open], image = gallery.images[i], stage = $("dialog .stage");
  const ratio = (image.width || 4) / (image.height || 3);
  stage.style.aspectRatio = ratio;
  stage.style.width = `min(100%, ${Math.round(0.72 * window.innerHeight * ratio)}px)`;
  draw(stage, i, 2);
  const { wrong, right, missed } = judged(i);
  $("dialog p").textContent = `${state.open + 1} of ${state.list.length}: ${image.file}. ${right.length} right, ${wrong.length} wrong, ${missed.length} missed. Arrow keys step, Escape closes.`;
}

function step(by) {
  const next = state.open + by;
  if (next < 0 || next >= state.list.length) return;
  enlarge(next);
}

function choices(select, entries) {
  const value = select.value;
  select.replaceChildren(...entries.map(([v, text]) => make("option", { value: v }, text)));
  if (entries.some(([v]) => String(v) === value)) select.value = value;
}

function setUpGallery() {
  const form = $("#gallery form"), n = numbers();
  choices(form.class, [[-1, "any"], ...n.classes.map((row, k) => [k, row.name])]);
  choices(form.error, [[-1, "any"], ...ERRORS.map((name, k) => [k, name])]);
  choices(form.size, [[-1, "any"], ...gallery.tasks[state.task].sizes.map((name, k) => [k, name])]);
  choices(form.order, [["worst", "most errors"], ["file", "file name"], ...(n.compare ? [["worse", "worse with second"], ["better", "better with second"]] : [])]);
  choices(form.detector, [[0, report.names.first], [1, report.names.second || ""]]);
  form.detector.parentElement.hidden = !n.compare;
  $("#legend").replaceChildren(...[...ERRORS, "right", "object"].map(name => make("span", { title: MEANINGS[name] }, swatch(COLORS[name]), name)));
}

// ---- start

function show(task) {
  state.task = task;
  state.score = numbers().threshold;
  state.shown = 0;
  $("#about").textContent = `${report.names.first} on ${report.dataset}: ${report.num_images} images, ${report.num_objects} objects`;
  const tasks = Object.keys(report.tasks);
  $("#tasks").replaceChildren(...(tasks.length < 2 ? [] : tasks).map(name => make("button", { type: "button", ariaPressed: String(name === task), onclick: () => show(name) }, report.nouns[name])));
  for (const part of [headline, suggestionList, errorTable, classTable, confusionTable, breakdownTable, comparison, curves, setUpGallery, relist]) part();
}

const form = $("#gallery form");
form.onsubmit = event => event.preventDefault();
for (const select of form.querySelectorAll("select")) select.onchange = () => { state.detector = Number(form.detector.value); state.shown = 0; relist(); };
for (const box of [form.right, form.objects]) box.onchange = redraw;
for (const input of document.querySelectorAll("input[type=range]")) {
  input.oninput = () => { state.score = Number(input.value); soon(redraw); };
  input.onchange = () => { if (!$("dialog").open) relist(); };
}
for (const button of document.querySelectorAll("dialog [data-step]")) button.onclick = () => step(Number(button.dataset.step));
$("dialog").onkeydown = event => {
  if (event.target.type === "range") return;
  if (event.key === "ArrowRight" || event.key === "ArrowDown") step(1);
  if (event.key === "ArrowLeft" || event.key === "ArrowUp") step(-1);
};
$("dialog").onclose = relist;
window.onresize = () => soon(() => { charts.forEach(([plot, root]) => plot.setSize({ width: root.clientWidth, height: 260 })); redraw(); });
show(state.task);
