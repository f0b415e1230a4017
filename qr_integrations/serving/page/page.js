/* The page of the server: ranks documents, asks pictures. What comes from outside is shown as text, never as HTML. */

const $ = (id) => document.getElementById(id);
const EXAMPLE = 30; // the question to begin with
const SCALES = { share: " Scores are shares of this list.", sigmoid: " Scores of 0.5 and below mean: not looked at." };
const TINT = [255, 80, 0];

/** Something went wrong and has been put into words. */
class Trouble extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** A new element with text or other elements in it. */
function made(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content);
  return element;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

function tried(make) {
  try {
    return make();
  } catch {
    return null;
  }
}

const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const inSeconds = (seconds) => `${seconds.toFixed(seconds < 10 ? 2 : 0)} s`;
const inBytes = (size) => (size < 2 ** 20 ? `${Math.ceil(size / 2 ** 10)} kB` : `${(size / 2 ** 20).toFixed(1)} MB`);
const tooLarge = (size, most) => new Trouble(`This is ${inBytes(size)}; the server takes ${inBytes(most)}.`);

// ---- the server

const storage = tried(() => sessionStorage); // browsers may forbid it
let key = storage?.getItem("qr-key") ?? "";
let about = null; // what the server takes, and its scale of scores
let retry = null; // what to do again once there is a key

/** Asks the server; returns the response if it is a good one. */
async function call(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    const size = new Blob([options.body]).size;
    if (about && size > about.max_body_bytes) throw tooLarge(size, about.max_body_bytes);
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  if (response.status === 401) {
    return new Trouble(key ? "The server does not know this key." : "The server asks for an API key.", 401);
  }
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const again = wait === null ? "" : ` Try again in ${plural(Number(wait), "second")}.`;
  return new Trouble(`${meaning(response.status)}${told(body)}${again}`, response.status);
}

function meaning(status) {
  if (status === 429) return "The server has too much to do just now: ";
  if (status === 503) return "The server is not ready: ";
  if (status >= 500) return "The server failed: ";
  return "The server cannot use this: ";
}

/** The message in an error of any of the server's APIs. */
function told(body) {
  const message = body?.error?.message ?? body?.message ?? body?.error ?? body?.detail;
  if (typeof message !== "string" || !message) return "it did not say why.";
  return /[.!?]$/.test(message) ? message : `${message}.`;
}

/** Runs one piece of work of a form: its buttons, its status, its errors, and the button that stops it. */
async function working(name, work) {
  const [button, stop, status, alert] = ["button", "stop", "status", "error"].map((part) => $(`${name}-${part}`));
  const controller = new AbortController();
  const halt = () => controller.abort();
  stop.addEventListener("click", halt);
  const focused = document.activeElement === button;
  button.disabled = true;
  stop.hidden = false;
  if (focused) stop.focus();
  show(alert, "");
  try {
    await work(controller.signal);
  } catch (error) {
    failed(error, status, alert, () => working(name, work));
  } finally {
    const stopped = document.activeElement === stop;
    stop.removeEventListener("click", halt);
    button.disabled = false;
    stop.hidden = true;
    if (stopped) button.focus();
  }
}

function failed(error, status, alert, again) {
  if (error.name === "AbortError") {
    status.textContent = "Stopped.";
    return;
  }
  status.textContent = "";
  if (error.status === 401) askForKey(again);
  show(alert, error instanceof Trouble ? error.message : `This page failed: ${error.message}`);
}

function askForKey(again) {
  retry = again;
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  if ($("key-keep").checked) storage?.setItem("qr-key", key);
  else storage?.removeItem("qr-key");
  $("key").value = "";
  $("key-form").hidden = true;
  const again = retry;
  retry = null;
  if (await findModels()) await again?.();
});

// ---- what is served

let models = [];

/** Waits until something is served, and shows it; false if the server does not tell. */
async function findModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    $("server").textContent = data.length ? `Serving ${data.map(({ id }) => id).join(", ")}` : await loading();
    if (data.length) return offer(data);
  } catch (error) {
    $("server").textContent = error.message;
    if (error.status === 401) askForKey(null);
    if (error.status && error.status !== 503) return false;
  }
  await new Promise((resolve) => setTimeout(resolve, 2000));
  return findModels();
}

async function loading() {
  const { status } = await (await fetch(new URL("ready", document.baseURI))).json();
  return status === "failed" ? "The models could not be loaded: the server's log tells why." : "Loading the models …";
}

/** Shows what the models that are served can do. */
function offer(data) {
  models = data.filter((model) => model.chats);
  models.sort((a, b) => Number(b.sees_pictures) - Number(a.sees_pictures));
  const sees = models.some((model) => model.sees_pictures);
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  $("ask-none").hidden = sees;
  $("ask-none-text").textContent = models.length
    ? "No model that sees pictures is served: only text can be asked about. This starts a server with one:"
    : "No model that sees pictures is served. This starts a server with one:";
  $("ask-form").hidden = !models.length;
  $("picture-part").hidden = !sees;
  pictureChanged();
  return true;
}

// ---- ranking

let example = EXAMPLE;

/** One document per paragraph. */
const documentsIn = (text) => text.split(/\n\s*\n/).map((part) => part.trim()).filter(Boolean);

function fillDocuments(documents) {
  $("documents").value = documents.map((text) => text.trim().replace(/\n\s*\n/g, "\n")).join("\n\n");
  countDocuments();
  clearRanking();
}

function countDocuments() {
  const number = documentsIn($("documents").value).length;
  $("documents-count").textContent = number ? `${plural(number, "document")}.` : "";
}

async function rank(signal) {
  const [query, documents] = [$("query").value.trim(), documentsIn($("documents").value)];
  if (!query || !documents.length) throw new Trouble("Write a query, and at least one document.");
  if (about && documents.length > about.max_documents) {
    throw new Trouble(`The server ranks ${about.max_documents} documents at a time; these are ${documents.length}.`);
  }
  const status = $("rank-status");
  status.textContent = `Reading ${plural(documents.length, "document")} …`;
  const start = performance.now();
  const body = { query, documents, explain: true, return_documents: true };
  const response = await call("v1/rerank", body, signal).catch((error) => {
    clearRanking();
    throw error;
  });
  const found = await response.json();
  const seconds = (performance.now() - start) / 1000;
  showRanking(found);
  const tokens = found.usage ? `, ${plural(found.usage.total_tokens, "token")}` : "";
  const ranked = plural(found.results.length, "document");
  status.textContent = `${ranked} ranked in ${inSeconds(seconds)}${tokens}.${SCALES[about?.normalize] ?? ""}`;
}

function clearRanking() {
  $("ranking").replaceChildren();
  $("rank-notes").hidden = true;
  $("rank-status").textContent = "";
}

function showRanking({ results, notes }) {
  const best = Math.max(...results.map((result) => result.relevance_score), 0);
  const strongest = Math.max(...results.flatMap(({ qr_spans }) => qr_spans ?? []).map(({ score }) => score), 0);
  $("ranking").replaceChildren(...results.map((result, place) => line(result, place, best, strongest)));
  $("rank-notes").replaceChildren(...(notes ?? []).map((note) => made("li", "", note)));
  $("rank-notes").hidden = !notes?.length;
}

/** A document of the ranking; its text can be folded away. */
function line(result, place, best, strongest) {
  const letters = Array.from(result.document.text); // spans count characters as Python does
  const spans = [...(result.qr_spans ?? [])].sort((a, b) => a.start - b.start);
  const end = letters.indexOf("\n");
  const titled = end > 0 && end <= 120;
  const head = titled ? marked(letters, spans, 0, end, strongest) : untitled(letters, result);
  const title = made("span", "title", ...head);
  if (result.qr_truncated) title.append(made("span", "tag", "cut to fit"));
  const fill = made("i");
  fill.style.width = `${best > 0 ? Math.max(0, (100 * result.relevance_score) / best) : 0}%`;
  const bar = made("span", "bar", fill);
  bar.setAttribute("aria-hidden", "true");
  const number = made("span", "score", result.relevance_score.toFixed(3));
  number.title = `attention: ${result.qr_score.toPrecision(3)}`;
  const summary = made("summary", "", made("span", "place", `${place + 1}`), title, bar, number);
  const rest = marked(letters, spans, titled ? end + 1 : 0, letters.length, strongest);
  const details = made("details", "", summary, made("p", "text", ...rest));
  details.open = place < 3;
  const item = made("li", "", details);
  item.dataset.index = result.index;
  return item;
}

function untitled(letters, { index }) {
  const excerpt = letters.slice(0, 90).join("") + (letters.length > 90 ? " …" : "");
  return [made("span", "number", `Document ${index + 1}`), made("span", "excerpt", excerpt)];
}

/** The characters from `start` to `stop`, in marks where the spans are. */
function marked(letters, spans, start, stop, strongest) {
  const parts = [];
  let place = start;
  for (const span of spans) {
    const [from, to] = [Math.max(span.start, place), Math.min(span.end, stop)];
    if (from >= to) continue;
    const mark = made("mark", "", letters.slice(from, to).join(""));
    mark.style.setProperty("--strength", strongest > 0 ? Math.max(0, span.score / strongest).toFixed(3) : "1");
    mark.title = span.score.toFixed(4);
    parts.push(letters.slice(place, from).join(""), mark);
    place = to;
  }
  return [...parts, letters.slice(place, stop).join("")];
}

async function loadQuestion() {
  const found = await (await call(`page/examples/questions/${example}`)).json();
  example = (example + 1) % found.of;
  $("query").value = found.query;
  fillDocuments(found.documents.map(({ title, text }) => (title ? `${title}\n${text}` : text)));
  show($("rank-source"), `Source: ${found.source}.`);
}

/** Documents of dropped files: paragraphs of a text, lines of a JSONL file; a line may hold a query too. */
async function readFiles(files) {
  const documents = [];
  for (const file of files) {
    const text = (await file.text()).replaceAll("\r\n", "\n");
    const rows = text.split("\n").map((row, number) => [row, `${file.name}, line ${number + 1}`]);
    const inLines = /\.(jsonl|ndjson)$/i.test(file.name);
    documents.push(...(inLines ? rows.flatMap(([row, where]) => documentsOf(row, where)) : documentsIn(text)));
  }
  fillDocuments(documents);
  show($("rank-source"), "");
}

function documentsOf(row, where) {
  if (!row.trim()) return [];
  const entry = tried(() => JSON.parse(row));
  const query = entry?.query ?? entry?.question;
  if (typeof query === "string") $("query").value = query;
  return (entry?.documents ?? [entry]).map((given) => {
    const text = typeof given === "string" ? given : given?.text;
    if (typeof text !== "string") {
      throw new Trouble(`${where}: write a string, {"text": …}, or {"query": …, "documents": […]}.`);
    }
    return given.title ? `${given.title}\n${text}` : text;
  });
}

// ---- pictures

let picture = null; // a data: address
let pictureNumber = 0;
let seen = null; // the heat map that is shown

async function takePicture(file) {
  if (!file) return;
  if (about && file.size > about.max_picture_bytes) throw tooLarge(file.size, about.max_picture_bytes);
  const address = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Trouble("The file cannot be read."));
    reader.readAsDataURL(file);
  });
  await showPicture(address);
}

async function showPicture(address) {
  const image = $("picture");
  image.src = address;
  try {
    await image.decode();
  } catch {
    removePicture();
    throw new Trouble("This file is no picture that the browser can show: choose a PNG, JPEG, WebP or GIF.");
  }
  picture = address;
  pictureChanged();
}

function removePicture() {
  picture = null;
  $("picture").removeAttribute("src");
  $("picture-file").value = "";
  pictureChanged();
}

function pictureChanged() {
  const there = picture !== null;
  $("stage").hidden = !there;
  $("frame-hint").hidden = there;
  $("frame").classList.toggle("filled", there);
  $("picture-remove").hidden = !there;
  $("ways").hidden = !there;
  for (const option of $("model").options) {
    option.disabled = there && !models.find(({ id }) => id === option.value).sees_pictures;
  }
  if ($("model").selectedOptions[0]?.disabled) $("model").selectedIndex = 0;
  $("model-part").hidden = models.length < 2;
  clearAnswer();
}

function clearAnswer() {
  seen = null;
  $("said").hidden = $("heat-controls").hidden = $("heat").hidden = $("box").hidden = true;
  $("ask-status").textContent = "";
  show($("ask-error"), "");
}

async function loadPicture() {
  const found = await (await call(`page/examples/pictures/${pictureNumber}`)).json();
  pictureNumber = (pictureNumber + 1) % found.of;
  await showPicture(found.picture);
  $("question").value = found.question;
}

// ---- asking

function conversation() {
  const question = $("question").value.trim();
  if (!question) throw new Trouble("Write a question.");
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  const said = { type: "text", text: question };
  const content = picture ? [{ type: "image_url", image_url: { url: picture } }, said] : question;
  const ways = picture ? { crop: $("crop").checked, deco: $("deco").checked, heat_map: true } : {};
  if (picture && $("prune").checked) ways.prune = 0.5;
  return { ...body, messages: [{ role: "user", content }], ...ways };
}

async function ask(signal) {
  const body = conversation();
  clearAnswer();
  $("ask-status").textContent = picture ? "Looking …" : "Thinking …";
  const start = performance.now();
  const response = await call("v1/chat/completions", body, signal);
  const answer = $("answer");
  answer.textContent = "";
  answer.setAttribute("aria-busy", "true");
  $("said").hidden = false;
  $("facts").replaceChildren();
  try {
    const whole = await received(response, (piece) => answer.append(piece));
    showFacts(whole, (performance.now() - start) / 1000);
  } finally {
    answer.setAttribute("aria-busy", "false");
  }
}

/** Everything the chunks of a stream say besides the text; `tell` gets that, piece by piece. */
async function received(response, tell) {
  const whole = {};
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Trouble(told(chunk));
    const [choice] = chunk.choices ?? [];
    if (choice?.delta?.content) tell(choice.delta.content);
    if (choice?.finish_reason) Object.assign(whole, chunk, { finish_reason: choice.finish_reason });
    if (chunk.usage) whole.usage = chunk.usage;
  }
  if (!whole.finish_reason) throw new Trouble("The answer broke off.");
  return whole;
}

/** The JSON of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Trouble("The connection broke off.");
    });
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const rows = block.split(/\r?\n/).filter((row) => row.startsWith("data:"));
      const data = rows.map((row) => row.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// ---- how it was answered

function showFacts(whole, seconds) {
  const { crop, prune, deco } = whole.qr_steps ?? {};
  const [map] = whole.qr_heat_maps ?? [];
  const facts = [];
  const { usage } = whole;
  if (crop?.length) facts.push(cropInWords(crop[0], map));
  if (prune?.stages?.length) {
    facts.push(`It read ${prune.stages.at(-1).kept} of ${prune.stages[0].of} tokens of the picture.`);
  }
  if (deco) facts.push(`Earlier layers changed ${Math.round(100 * deco.share_changed)} % of the words.`);
  if (usage) facts.push(`It read ${plural(usage.prompt_tokens, "token")} and wrote ${usage.completion_tokens}.`);
  if (whole.finish_reason === "length") facts.push("The answer was cut: it was as long as the server allows.");
  $("facts").replaceChildren(...facts.filter(Boolean).map((fact) => made("li", "", fact)));
  const { crop: looking, generate } = whole.qr_seconds ?? {};
  const parts = looking ? `: ${inSeconds(looking)} to look, ${inSeconds(generate)} to answer` : "";
  $("ask-status").textContent = `Answered in ${inSeconds(seconds)}${parts}.`;
  if (map) showMap(map, crop?.[0]);
}

function cropInWords({ box, lift, reason }, map) {
  if (!box) return reason && `No second look: ${reason}.`;
  const where = map ? ` at the ${placeOf(box, map.image_size)}` : "";
  const size = `${box[2] - box[0]} × ${box[3] - box[1]} pixels`;
  const times = `${lift.toFixed(1)} times as much as on average (lift ${lift.toFixed(2)})`;
  return `It looked again at ${size}${where}, where it had looked ${times}.`;
}

/** In which ninth of the picture a box has its middle. */
function placeOf([left, top, right, bottom], [width, height]) {
  const third = (middle, whole, names) => names[Math.min(2, Math.max(0, Math.floor((3 * middle) / whole)))];
  const across = third((left + right) / 2, width, ["left", "", "right"]);
  const down = third((top + bottom) / 2, height, ["upper", "", "lower"]);
  return `${down} ${across}`.trim() || "centre";
}

function showMap(map, look) {
  seen = map;
  $("heat-controls").hidden = false;
  const { values, covers, image_size: size } = map;
  const flat = values.flat();
  const strongest = flat.indexOf(Math.max(...flat));
  const [row, column] = [Math.floor(strongest / values[0].length), strongest % values[0].length];
  const x = covers[0] + ((column + 0.5) * (covers[2] - covers[0])) / values[0].length;
  const y = covers[1] + ((row + 0.5) * (covers[3] - covers[1])) / values.length;
  $("heat").setAttribute("aria-label", `Heat map: it looked most at the ${placeOf([x, y, x, y], size)}`);
  const box = $("box");
  box.dataset.there = look?.box ? "yes" : "";
  if (look?.box) {
    const [left, top, right, bottom] = look.box;
    box.style.left = `${(100 * left) / size[0]}%`;
    box.style.top = `${(100 * top) / size[1]}%`;
    box.style.width = `${(100 * (right - left)) / size[0]}%`;
    box.style.height = `${(100 * (bottom - top)) / size[1]}%`;
    box.setAttribute("aria-label", `The crop: the ${placeOf(look.box, size)} of the picture`);
  }
  drawMap();
}

function drawMap() {
  const shown = seen !== null && $("heat-shown").checked;
  $("heat").hidden = !shown;
  $("box").hidden = !shown || !$("box").dataset.there;
  if (!shown) return;
  const [canvas, image] = [$("heat"), $("picture")];
  const { values, covers, image_size: size } = seen;
  canvas.width = Math.round(image.clientWidth * devicePixelRatio);
  canvas.height = Math.round(image.clientHeight * devicePixelRatio);
  const [across, down] = [canvas.width / size[0], canvas.height / size[1]];
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  const [left, top, right, bottom] = covers;
  pen.drawImage(cells(values), left * across, top * down, (right - left) * across, (bottom - top) * down);
  canvas.style.opacity = $("heat-opacity").value / 100;
}

/** The map, one pixel per cell; transparent where it is 0. */
function cells(values) {
  const small = document.createElement("canvas");
  small.width = values[0].length;
  small.height = values.length;
  const pen = small.getContext("2d");
  const pixels = pen.createImageData(small.width, small.height);
  values.flat().forEach((value, place) => pixels.data.set([...TINT, Math.round(255 * value)], 4 * place));
  pen.putImageData(pixels, 0, 0);
  return small;
}

// ---- what starts what

/** Shows what goes wrong beside the form it belongs to. */
function guarded(name, work) {
  return async (...given) => {
    show($(`${name}-error`), "");
    try {
      await work(...given);
    } catch (error) {
      failed(error, $(`${name}-status`), $(`${name}-error`), () => guarded(name, work)(...given));
    }
  };
}

function onSubmit(name, work) {
  const form = $(`${name}-form`);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!$(`${name}-button`).disabled) working(name, work);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

function onDrop(element, take) {
  element.addEventListener("dragover", () => element.classList.add("dropping"));
  element.addEventListener("dragleave", () => element.classList.remove("dropping"));
  element.addEventListener("drop", (event) => {
    element.classList.remove("dropping");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  });
}

for (const name of ["dragover", "drop"]) {
  window.addEventListener(name, (event) => {
    if (event.dataTransfer.types.includes("Files")) event.preventDefault(); // one that misses would replace the page
  });
}
onSubmit("rank", rank);
onSubmit("ask", ask);
const takeDocuments = guarded("rank", readFiles);
const takeOne = guarded("ask", ([file]) => takePicture(file));
$("documents").addEventListener("input", countDocuments);
$("rank-example").addEventListener("click", guarded("rank", loadQuestion));
$("documents-files").addEventListener("change", async ({ target }) => {
  await takeDocuments([...target.files]);
  target.value = ""; // the same file may be chosen again
});
onDrop($("documents"), takeDocuments);
$("picture-example").addEventListener("click", guarded("ask", loadPicture));
$("picture-remove").addEventListener("click", () => {
  removePicture();
  $("picture-file").focus();
});
$("picture-file").addEventListener("change", ({ target }) => takeOne(target.files));
onDrop($("frame"), takeOne);
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter(({ type }) => type.startsWith("image/"));
  if (!files.length || $("picture-part").hidden || $("ask-form").hidden) return;
  event.preventDefault();
  takeOne(files);
});
$("heat-shown").addEventListener("change", drawMap);
$("heat-opacity").addEventListener("input", drawMap);
new ResizeObserver(drawMap).observe($("picture"));

call("page/about.json")
  .then(async (response) => (about = await response.json()))
  .catch(() => null) // it is told in what the models are asked for
  .then(findModels);
