/** The picture of the VM: dirty rectangles of B G R X pixels on a canvas, and the VM's pointer. */

import { atNextFrame } from "./dom.js";

const MAX_SIDE = 16384;
/** Chromium shows no larger pictures as the pointer, and near the edge of its window only those up to 32 pixels. */
const MAX_CSS_CURSOR = 64;

/**
 * Convert pixels: B G R X of the wire to R G B A of a canvas, opaque.
 *
 * @param {ArrayBuffer} buffer
 * @param {number} offset in bytes, a multiple of 4
 * @param {number} count of pixels
 * @returns {Uint8ClampedArray<ArrayBuffer>}
 */
export function toRgba(buffer, offset, count) {
  const source = new Uint32Array(buffer, offset, count);
  const target = new Uint32Array(count);
  for (let index = 0; index < count; index++) {
    const pixel = source[index];
    target[index] = 0xff000000 | (pixel & 0xff) << 16 | pixel & 0xff00 | pixel >>> 16 & 0xff;
  }
  return new Uint8ClampedArray(target.buffer);
}

/**
 * Convert a pointer's shape: B G R A to R G B A.
 *
 * @param {ArrayBuffer} buffer
 * @param {number} count of pixels
 */
function pointerToRgba(buffer, count) {
  const source = new Uint32Array(buffer, 0, count);
  const target = new Uint32Array(count);
  for (let index = 0; index < count; index++) {
    const pixel = source[index];
    target[index] = pixel & 0xff00ff00 | (pixel & 0xff) << 16 | pixel >>> 16 & 0xff;
  }
  return new Uint8ClampedArray(target.buffer);
}

export class Picture {
  /**
   * @param {object} owner
   * @param {(serial: number) => void} owner.acknowledge called after each message was drawn
   * @param {() => void} owner.frame called when the picture is complete
   */
  constructor(owner) {
    this.owner = owner;
    this.canvas = document.createElement("canvas");
    this.canvas.className = "picture";
    this.canvas.width = this.canvas.height = 1;
    this.context = /** @type {CanvasRenderingContext2D} */ (this.canvas.getContext("2d", { alpha: false }));
    this.pointer = document.createElement("canvas");
    this.pointer.className = "vmpointer";
    this.pointer.hidden = true;
    /** @type {{data: any, bytes: ArrayBuffer}[]} */
    this.queue = [];
    /** @type {(() => void) | null} cancels the drawing of what waits */
    this.cancel = null;
    this.shape = { width: 0, height: 0, x: 0, y: 0, url: "" };
    this.at = { visible: false, x: 0, y: 0 };
    /** The pointer is this browser's own, in the shape of the VM's; otherwise it is drawn where the VM has it. */
    this.ownPointer = false;
    /** @type {HTMLElement | null} */
    this.holder = null;
    document.addEventListener("visibilitychange", () => { if (document.hidden) this.flush(); });
  }

  /** @param {HTMLElement} holder the element that shows the picture and the pointer */
  attach(holder) {
    this.holder = holder;
    holder.prepend(this.canvas, this.pointer);
    this.showPointer();
  }

  /**
   * Draw a message `screen` at the next frame; in a hidden tab at once.
   *
   * @param {any} data @param {ArrayBuffer} bytes
   */
  update(data, bytes) {
    this.queue.push({ data, bytes });
    if (document.hidden) this.flush();
    else if (this.cancel === null) this.cancel = atNextFrame(() => this.flush());
  }

  /** Draw what waits. */
  flush() {
    this.cancel?.();
    this.cancel = null;
    for (const { data, bytes } of this.queue.splice(0)) {
      this.draw(data, bytes);
      this.owner.acknowledge(data.serial);
      if (data.last) this.owner.frame();
    }
  }

  /** @param {any} data @param {ArrayBuffer} bytes */
  draw(data, bytes) {
    const { width, height, rects } = data;
    if (!(width > 0 && height > 0 && width <= MAX_SIDE && height <= MAX_SIDE)) return;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    let offset = 0;
    for (const [x, y, columns, rows] of rects) {
      const count = columns * rows;
      if (!(count > 0) || offset + 4 * count > bytes.byteLength) return;
      this.context.putImageData(new ImageData(toRgba(bytes, offset, count), columns, rows), x, y);
      offset += 4 * count;
    }
    this.placePointer();
  }

  /**
   * Take note of the VM's pointer: where it is, and its shape if there are bytes.
   *
   * @param {any} data @param {ArrayBuffer | null} bytes
   */
  cursor(data, bytes) {
    this.at = { visible: data.visible, x: data.x, y: data.y };
    if (bytes !== null && data.width > 0 && data.height > 0 && bytes.byteLength === 4 * data.width * data.height) {
      this.pointer.width = data.width;
      this.pointer.height = data.height;
      const context = /** @type {CanvasRenderingContext2D} */ (this.pointer.getContext("2d"));
      context.putImageData(new ImageData(pointerToRgba(bytes, data.width * data.height), data.width, data.height), 0, 0);
      const shape = { width: data.width, height: data.height, x: data.hot_x, y: data.hot_y, url: "" };
      URL.revokeObjectURL(this.shape.url);
      this.shape = shape;
      this.pointer.toBlob((blob) => {
        if (blob === null || this.shape !== shape) return;
        shape.url = URL.createObjectURL(blob);
        this.showPointer();
      });
    }
    this.showPointer();
  }

  /** @param {boolean} own whether the pointer over the picture is this browser's own */
  setOwnPointer(own) {
    if (own === this.ownPointer) return;
    this.ownPointer = own;
    this.showPointer();
  }

  showPointer() {
    if (this.holder === null) return;
    const { width, height, x, y, url } = this.shape;
    const fits = width <= MAX_CSS_CURSOR && height <= MAX_CSS_CURSOR;
    const native = this.ownPointer && fits;
    if (!this.ownPointer) this.holder.style.cursor = "";
    else if (!this.at.visible && width > 0) this.holder.style.cursor = "none";
    else if (native && url !== "") this.holder.style.cursor = `url("${url}") ${x} ${y}, default`;
    else this.holder.style.cursor = width > 0 && !fits ? "none" : "default";
    this.pointer.hidden = width === 0 || !this.at.visible || native;
    this.placePointer();
  }

  placePointer() {
    if (this.pointer.hidden) return;
    const scale = this.canvas.clientWidth / this.canvas.width || 1;
    this.pointer.style.transform = `translate(${(this.at.x - this.shape.x) * scale}px, ${(this.at.y - this.shape.y) * scale}px) scale(${scale})`;
  }

  /**
   * Return the position on the picture of a position in the window, in pixels of the VM.
   *
   * @param {number} clientX @param {number} clientY
   */
  position(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const scale = (/** @type {number} */ at, /** @type {number} */ size, /** @type {number} */ pixels) =>
      Math.min(Math.max(Math.floor(at * pixels / (size || 1)), 0), pixels - 1);
    return {
      x: scale(clientX - box.left, box.width, this.canvas.width),
      y: scale(clientY - box.top, box.height, this.canvas.height),
    };
  }

  /** Save the picture as a PNG file. @param {string} name of the file */
  save(name) {
    this.flush();
    this.canvas.toBlob((blob) => {
      if (blob === null) return;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    }, "image/png");
  }
}
