"use strict";
// Panes with one zoom, and a before/after slider. A pane is an element .window; all images in it are shown as large as
// viewer.size, width and height in pixels. The slider is the pane with #over (A, left of the line) and #under (B).
const $ = id => document.getElementById(id);
const viewer = {
  size: [1, 1], flipped: false, names: ["", ""],
  // zoom: screen pixels per image pixel, null for the whole image; x, y: the image pixel at the top left
  zoom: null, x: 0, y: 0,
  // called when somebody has moved the line or flipped the sides
  compared() {},
};
const SLIDER = `<div class="window">
<img id="under" alt=""><img id="over" alt=""><div id="line"></div>
<div class="name" id="name-a"></div><div class="name" id="name-b"></div>
</div>
<input id="split" type="range" min="0" max="1000" value="500" aria-label="before and after">`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// The scale that shows the whole image. Enlarged only by whole numbers of the screen's pixels: others would blur some
// pixels and not others.
function whole(pane) {
  const [w, h] = viewer.size, dots = window.devicePixelRatio;
  const fit = Math.min(pane.clientWidth / w, pane.clientHeight / h);
  return fit * dots > 1 ? Math.floor(fit * dots) / dots : fit;
}

// of a pane: scale in screen pixels per image pixel, and the image pixel at its top left; a whole image stands in the
// middle
function view(pane) {
  if (viewer.zoom !== null) return { scale: viewer.zoom, left: viewer.x, top: viewer.y };
  const [w, h] = viewer.size, scale = whole(pane);
  return { scale, left: (w - pane.clientWidth / scale) / 2, top: (h - pane.clientHeight / scale) / 2 };
}

// The view for all panes; the middle of this one always shows the image.
function look(pane, zoom, x, y) {
  const [w, h] = viewer.size, [across, down] = [pane.clientWidth / zoom / 2, pane.clientHeight / zoom / 2];
  Object.assign(viewer, { zoom, x: clamp(x, -across, w - across), y: clamp(y, -down, h - down) });
  place();
}

function place() {
  const [w, h] = viewer.size, dots = window.devicePixelRatio, snap = length => Math.round(length * dots) / dots;
  for (const pane of document.querySelectorAll(".window")) {
    const { scale, left, top } = view(pane), perDot = scale * dots;
    for (const img of pane.querySelectorAll("img")) {
      // the LR image is shown as large as the others
      img.style.width = w + "px";
      img.style.height = h + "px";
      img.style.transform = `translate(${snap(-left * scale)}px, ${snap(-top * scale)}px) scale(${scale})`;
      img.style.imageRendering = perDot >= 3 || Number.isInteger(perDot) ? "pixelated" : "auto";
    }
    if (pane.contains($("over"))) {
      const at = $("split").value / 1000 * pane.clientWidth, inside = clamp(at / scale + left, 0, w);
      $("line").style.left = at + "px";
      $("over").style.clipPath = viewer.flipped ? `inset(0 0 0 ${inside}px)` : `inset(0 ${w - inside}px 0 0)`;
      const [a, b] = viewer.flipped ? [1, 0] : [0, 1];
      $("name-a").textContent = viewer.names[a];
      $("name-b").textContent = viewer.names[b];
    }
  }
}

function showWhole() {
  viewer.zoom = null;
  place();
}

function flip(to) {
  if (viewer.flipped === to) return;
  viewer.flipped = to;
  place();
  viewer.compared();
}

function moveLine(value) {
  $("split").value = value;
  place();
  viewer.compared();
}

// cx, cy: the screen pixel of the pane that keeps its place; zooming out ends at the whole image
function zoomAt(pane, cx, cy, factor) {
  const { scale, left, top } = view(pane), zoom = Math.min(scale * factor, 32);
  if (zoom <= whole(pane)) return showWhole();
  look(pane, zoom, left + cx / scale - cx / zoom, top + cy / scale - cy / zoom);
}

document.addEventListener("wheel", event => {
  const pane = event.target.closest(".window");
  if (!pane) return;
  event.preventDefault();
  const box = pane.getBoundingClientRect();
  zoomAt(pane, event.clientX - box.left, event.clientY - box.top, Math.exp(-event.deltaY / 400));
}, { passive: false });

// One pointer moves the image, or the line where it is taken or where the whole image is shown; two pointers zoom.
const pointers = new Map();
let onLine = false;
document.addEventListener("pointerdown", event => {
  const pane = event.target.closest(".window");
  if (!pane) return;
  pane.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  const slides = pane.contains($("over")) && !$("split").hidden;
  const away = Math.abs(event.clientX - pane.getBoundingClientRect().left - parseFloat($("line").style.left));
  onLine = slides && pointers.size === 1 && (viewer.zoom === null || away < 20);
});
document.addEventListener("pointermove", event => {
  const before = pointers.get(event.pointerId), pane = event.target.closest(".window");
  if (!before || !pane) return;
  const now = [event.clientX, event.clientY], box = pane.getBoundingClientRect();
  const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
  pointers.set(event.pointerId, now);
  if (onLine && !other) return moveLine(1000 * (now[0] - box.left) / box.width);
  const { scale, left, top } = view(pane), share = other ? 2 : 1;
  const [dx, dy] = [0, 1].map(k => (now[k] - before[k]) / scale / share);
  if (viewer.zoom !== null) look(pane, viewer.zoom, left - dx, top - dy);
  if (other) {
    const length = ([x, y]) => Math.hypot(x - other[0], y - other[1]);
    const [cx, cy] = [(now[0] + other[0]) / 2 - box.left, (now[1] + other[1]) / 2 - box.top];
    zoomAt(pane, cx, cy, length(now) / Math.max(length(before), 1));
  }
});
for (const end of ["pointerup", "pointercancel"]) {
  document.addEventListener(end, event => { pointers.delete(event.pointerId); });
}
document.addEventListener("keyup", event => { if (event.key === " ") flip(false); });
window.addEventListener("blur", () => flip(false));
window.addEventListener("resize", place);

function makeSlider(element) {
  element.innerHTML = SLIDER;
  $("split").oninput = () => moveLine($("split").value);
  // the keys are the page's again
  $("split").onpointerup = () => $("split").blur();
}
