// Pictures as a person gives them -> pictures as they are sent.

import { newId } from "./dom.js";

export const MAX_PIXELS = 4_000_000; // the models look at 1.8 million at most
export const MAX_BYTES = 8_000_000;
const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif"];

const addresses = new WeakMap();

/** A blob: address to show the picture by. */
export function urlOf(picture) {
  if (!addresses.has(picture)) addresses.set(picture, URL.createObjectURL(picture.blob));
  return addresses.get(picture);
}

export const looksLikePicture = (file) => file.type.startsWith("image/") || (file.type === "" && /\.(png|jpe?g|webp|gif|bmp|avif|heic|tiff?)$/i.test(file.name));

const encode = (canvas, type) => new Promise((resolve, reject) => {
  canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("encode"))), type, 0.92);
});

async function redraw(bitmap, width, height, type) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  if (type === "image/jpeg") { // it knows no transparency: white, as on paper
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, width, height);
  }
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, width, height);
  return encode(canvas, type);
}

async function decode(file) {
  if (file.type !== "image/svg+xml") return createImageBitmap(file); // turned as its EXIF says
  const url = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = url;
    await image.decode();
    return await createImageBitmap(image);
  } finally {
    URL.revokeObjectURL(url);
  }
}

/**
 * One file -> {id, name, type, width, height, blob, from, was}. `from` is [width, height] before
 * shrinking or null, `was` the type before conversion or null. Throws where it is no picture that
 * this browser reads.
 */
export async function read(file) {
  const bitmap = await decode(file);
  const [w, h] = [bitmap.width, bitmap.height];
  const picture = { id: newId(), name: file.name || "picture", type: file.type, width: w, height: h, blob: file, from: null, was: null };
  const fits = AS_THEY_ARE.includes(file.type);
  if (!fits || w * h > MAX_PIXELS || file.size > MAX_BYTES) {
    const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (w * h)));
    picture.width = Math.max(1, Math.floor(w * scale));
    picture.height = Math.max(1, Math.floor(h * scale));
    picture.blob = await redraw(bitmap, picture.width, picture.height, file.type === "image/jpeg" ? file.type : "image/png");
    if (picture.blob.size > MAX_BYTES) picture.blob = await redraw(bitmap, picture.width, picture.height, "image/jpeg");
    picture.type = picture.blob.type;
    if (!fits) picture.was = file.type || file.name.split(".").pop();
    if (fits || scale < 1) picture.from = [w, h];
  } else {
    picture.blob = new Blob([await file.arrayBuffer()], { type: file.type }); // the file may move or change
  }
  bitmap.close();
  return picture;
}

/** data: address of the bytes; `short` keeps the first 24 letters, for a command to look at. */
export async function dataUrl(picture, short = false) {
  const whole = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(picture.blob);
  });
  return short ? whole.slice(0, whole.indexOf(",") + 25) + "…" : whole;
}
