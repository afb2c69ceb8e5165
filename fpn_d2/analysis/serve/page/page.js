"use strict";

const find = (id) => document.getElementById(id);
const state = { about: null, bitmap: null, file: null, answer: null, hidden: new Set(), request: 0 };
const TRIES = 5;

// The colours of `fpn-d2 predict`: steps of the golden angle.
function colour(index) {
  const h = (index * 0.618034) % 1, v = 1, s = 0.85;
  const channel = (n) => {
    const k = (n + h * 6) % 6;
    return Math.round(255 * (v - v * s * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}
const css = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

function say(text, wrong = false) {
  find("status").textContent = text;
  find("status").classList.toggle("wrong", wrong);
}

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  Object.assign(made, attributes);
  return made;
}

function swatch(index) {
  const made = element("span", "", { className: "swatch" });
  made.style.background = css(colour(index));
  return made;
}

async function start() {
  state.about = await (await fetch("api/model")).json();
  find("model").textContent = `${state.about.model}, ${state.about.classes.length} classes`;
  find("by-level").hidden = !state.about.levels.length;
}

async function open(file) {
  const request = ++state.request;
  find("hint").textContent = file.name || "image";
  if (file.size > state.about.max_upload_bytes) {
    return say(`The file has ${(file.size / 2 ** 20).toFixed(1)} MB; at most ` +
      `${(state.about.max_upload_bytes / 2 ** 20).toFixed(0)} are taken.`, true);
  }
  say("Looking ...");
  try {
    const answer = await ask(file, request);
    if (request !== state.request) return;
    const bitmap = await createImageBitmap(file);
    if (request !== state.request) return;
    Object.assign(state, { file, answer, bitmap });
    const took = `${answer.width} x ${answer.height} pixels, ${answer.seconds.toFixed(2)} s`;
    say(took);
    show();
  } catch (error) {
    if (request === state.request) say(error.message, true);
  }
}

async function ask(file, request) {
  const maps = find("show-maps").checked ? "?maps=true" : "";
  for (let attempt = 1; ; attempt++) {
    const response = await fetch(`api/predict${maps}`, { method: "POST", body: file });
    if (response.ok) return response.json();
    const text = (await response.json().catch(() => ({}))).error || `the server said ${response.status}`;
    if (response.status !== 429 || attempt === TRIES) throw new Error(text);
    const seconds = Number(response.headers.get("Retry-After") || 1);
    say(`${text} (attempt ${attempt} of ${TRIES})`);
    await new Promise((resume) => setTimeout(resume, 1000 * seconds));
    if (request !== state.request) throw new Error("given up for another image");
  }
}

const classOf = (one) => state.about.classes.indexOf(one.category);
const byLevel = () => document.querySelector("input[name=colour]:checked").value === "level";
const colourOf = (one) => colour(byLevel() && one.level !== null ? one.level : classOf(one));
const chosen = () => state.answer.detections.filter(
  (one) => one.score >= Number(find("score").value) && !state.hidden.has(one.category));

function show() {
  find("score-value").textContent = Number(find("score").value).toFixed(2);
  if (!state.answer) return;
  const detections = chosen();
  find("shown").textContent = `Objects: ${detections.length} of ${state.answer.detections.length}`;
  find("json").textContent = JSON.stringify({ ...state.answer, detections, maps: undefined }, null, 1);
  showLevels(detections);
  showClasses();
  draw(detections);
  showMaps();
}

function showLevels(detections) {
  find("levels").replaceChildren(...(byLevel() ? state.about.levels : []).map((level) => {
    const count = detections.filter((one) => one.level === level).length;
    const item = element("span");
    item.append(swatch(level), `p${level} (${count})`);
    return item;
  }));
}

function showClasses() {
  const least = Number(find("score").value), counts = new Map();
  for (const one of state.answer.detections) {
    counts.set(one.category, (counts.get(one.category) || 0) + (one.score >= least));
  }
  find("all-none").hidden = counts.size < 2;
  find("classes").replaceChildren(...[...counts].sort((a, b) => b[1] - a[1]).map(([name, count]) => {
    const label = element("label");
    const box = element("input", "", { type: "checkbox", checked: !state.hidden.has(name), name: "class", value: name });
    box.addEventListener("change", () => {
      box.checked ? state.hidden.delete(name) : state.hidden.add(name);
      show();
    });
    label.append(box);
    if (!byLevel()) label.append(swatch(state.about.classes.indexOf(name)));
    label.append(name, element("span", String(count), { className: "number" }));
    return label;
  }));
}

function draw(detections) {
  const { width: wide, height: tall } = state.answer, canvas = find("canvas");
  find("picture").hidden = false;
  // Small images are enlarged on the screen, and what is drawn on them is sharp.
  const room = Math.min(find("picture").clientWidth / wide, 0.78 * innerHeight / tall);
  const shown = Math.min(room, Math.max(1, 640 / wide)), sharp = shown > 1 ? shown * devicePixelRatio : 1;
  canvas.style.width = `${wide * shown}px`;
  canvas.width = Math.round(wide * sharp);
  canvas.height = Math.round(tall * sharp);
  const context = canvas.getContext("2d");
  context.scale(canvas.width / wide, canvas.height / tall);
  context.drawImage(state.bitmap, 0, 0, wide, tall);
  const line = 2 / shown, size = 12 / shown;
  for (const one of [...detections].reverse()) { // the best on top
    const [x, y, width, height] = one.bbox, own = colourOf(one);
    if (one.segmentation) drawMask(context, one.segmentation, own);
    context.strokeStyle = css(own);
    context.lineWidth = line;
    context.strokeRect(x, y, width, height);
    for (let i = 0; one.keypoints && i < one.keypoints.length; i += 3) {
      context.fillStyle = css(own);
      context.beginPath();
      context.arc(one.keypoints[i], one.keypoints[i + 1], 1.5 * line, 0, 2 * Math.PI);
      context.fill();
    }
    if (!find("names").checked) continue;
    const text = `${one.category} ${Math.round(100 * one.score)}`;
    context.font = `${size}px system-ui, sans-serif`;
    const long = context.measureText(text).width + 0.5 * size, high = 1.25 * size;
    const left = Math.max(0, Math.min(x - line / 2, wide - long)), top = y >= high ? y - high : y;
    context.fillStyle = css(own);
    context.fillRect(left, top, long, high);
    context.fillStyle = "black";
    context.fillText(text, left + 0.25 * size, top + 0.95 * size);
  }
}

// COCO's compressed run lengths, down the columns: counts of zeros and ones in turn, in words of five bits.
function drawMask(context, mask, own) {
  const [height, width] = mask.size, counts = [];
  for (let i = 0; i < mask.counts.length;) {
    let value = 0, shift = 0, word;
    do {
      word = mask.counts.charCodeAt(i++) - 48;
      value |= (word & 31) << shift;
      shift += 5;
    } while (word & 32);
    if (word & 16) value |= -1 << shift;
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
  }
  const image = new ImageData(width, height);
  let place = 0;
  counts.forEach((count, number) => {
    for (const end = place + count; place < end; place++) {
      if (number % 2) image.data.set([...own, 105], 4 * ((place % height) * width + Math.floor(place / height)));
    }
  });
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(layer, 0, 0);
}

function showMaps() {
  const maps = find("show-maps").checked ? state.answer.maps || [] : [];
  find("maps").hidden = !maps.length;
  find("maps").replaceChildren(...maps.map((one) => {
    const figure = element("figure");
    const image = element("img", "", { src: `data:image/png;base64,${one.png}`, alt: `map ${one.name}` });
    image.style.aspectRatio = `${state.answer.width} / ${state.answer.height}`;
    figure.append(image, element("figcaption", `${one.name}: ${one.height} x ${one.width}`));
    return figure;
  }));
}

function hide(names) {
  state.hidden = new Set(names);
  show();
}

for (const id of ["score", "names"]) find(id).addEventListener("input", show);
for (const one of document.querySelectorAll("input[name=colour]")) one.addEventListener("change", show);
find("show-maps").addEventListener("change", (event) => {
  if (event.target.checked && state.file && !state.answer.maps) open(state.file);
  else show();
});
find("all").addEventListener("click", () => hide([]));
find("none").addEventListener("click", () => hide(state.answer.detections.map((one) => one.category)));
find("file").addEventListener("change", (event) => event.target.files[0] && open(event.target.files[0]));
find("save").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([find("json").textContent], { type: "application/json" }));
  element("a", "", { href: url, download: "detections.json" }).click();
  URL.revokeObjectURL(url);
});
window.addEventListener("resize", show);
for (const kind of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragover");
    const file = event.dataTransfer && event.dataTransfer.files[0];
    if (kind === "drop" && file) open(file);
  });
}
window.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) open(file);
});
start().catch((error) => say(`The server cannot be reached: ${error.message}`, true));
