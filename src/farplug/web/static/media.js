/** Files of this browser: read by the VM from this tab, or uploaded first. */

import { RequestError } from "./connection.js";
import { T } from "./texts.js";

/** Where ISO 9660 has its descriptors: sector 16, and those that follow. Source: ECMA-119, section 8.1. */
const DESCRIPTOR = 16 * 2048;
const IDS = ["CD001", "BEA01", "NSR02", "NSR03", "BOOT2"];
/** Bytes of a piece of an upload: a power of two below the limit of the server. */
export const PIECE = 4 * 1024 * 1024;

/**
 * Return a refusal of this page.
 *
 * @param {string} code @param {string} message @param {string} [remedy]
 */
export function refusal(code, message, remedy = "") {
  return new RequestError({ code, message, remedy });
}

/**
 * Return the file that was dropped.
 *
 * @param {DataTransfer} transfer
 * @returns {File}
 * @throws {RequestError} it is a folder, it is not a file, or there are several
 */
export function droppedFile(transfer) {
  const items = [...transfer.items].filter((one) => one.kind === "file");
  if (items.length === 0 && transfer.files.length === 0) throw refusal("not-a-file", T.notAFile);
  if (items.length > 1 || transfer.files.length > 1) throw refusal("bad-setting", T.twoFiles(Math.max(items.length, transfer.files.length)), T.twoFilesRemedy);
  if (items[0]?.webkitGetAsEntry?.()?.isDirectory) throw refusal("not-a-file", T.isFolder, T.isFolderRemedy);
  const file = transfer.files[0] ?? items[0]?.getAsFile();
  if (!file) throw refusal("not-a-file", T.notAFile);
  return file;
}

/**
 * Return the name of what was dropped, as far as it is known.
 *
 * @param {DataTransfer | null} transfer
 */
export function droppedName(transfer) {
  const names = [...(transfer?.files ?? [])].map((one) => one.name);
  return names.length > 0 ? names.join(", ") : T.noName;
}

/**
 * Return what a file becomes in the VM: `cdrom` for an ISO image, otherwise `read-only-disk`.
 *
 * @param {File} file
 * @throws {RequestError} the file is empty, or cannot be read
 */
export async function kindOf(file) {
  if (file.size === 0) {
    // A folder has no size either in some browsers, and its bytes cannot be read.
    await read(file, 0, 1);
    throw refusal("empty", T.isEmpty, T.isEmptyRemedy);
  }
  const bytes = new Uint8Array(await read(file, DESCRIPTOR, 4 * 2048));
  for (let start = 1; start + 5 <= bytes.length; start += 2048) {
    if (IDS.includes(String.fromCharCode(...bytes.subarray(start, start + 5)))) return "cdrom";
  }
  await read(file, 0, Math.min(file.size, 512));
  return "read-only-disk";
}

/**
 * Return bytes of a file.
 *
 * @param {File} file @param {number} offset @param {number} length
 * @throws {RequestError} the file cannot be read any more
 */
async function read(file, offset, length) {
  try {
    return await file.slice(offset, offset + length).arrayBuffer();
  } catch {
    throw refusal("io-error", T.vanished, T.vanishedRemedy);
  }
}

/**
 * Answer an event `media-read` with the bytes of a file, or with why they cannot be read.
 *
 * @param {import("./connection.js").Connection} connection
 * @param {any} data of the event
 * @param {File | undefined} file
 */
export async function answer(connection, data, file) {
  const { media, read: number, offset, length } = data;
  let bytes = new ArrayBuffer(0);
  let error = file === undefined ? T.vanished : null;
  try {
    if (file !== undefined) bytes = await read(file, offset, length);
    if (error === null && bytes.byteLength !== length) error = T.vanished;
  } catch (problem) {
    error = /** @type {Error} */ (problem).message;
  }
  const params = error === null ? { media, read: number } : { media, read: number, error };
  await connection.request("media-data", params, error === null ? bytes : new ArrayBuffer(0));
}

/** A file on its way to the machine where farplug runs. */
export class Upload {
  /** @param {number} key @param {File} file @param {{port: number | null, insert: any}} goal what follows */
  constructor(key, file, goal) {
    this.key = key;
    this.file = file;
    this.goal = goal;
    this.name = file.name;
    this.size = file.size;
    this.sent = 0;
    this.rate = 0;
    this.sum = "";
    this.path = "";
    this.error = "";
    /** @type {"sending" | "stopped" | "done"} */
    this.state = "stopped";
    this.abort = new AbortController();
  }

  stop() {
    this.abort.abort();
  }

  /**
   * Send what the server does not have yet.
   *
   * @param {string} token @param {() => void} changed called after each piece
   * @returns {Promise<boolean>} whether the file is there as a whole
   */
  async send(token, changed) {
    this.state = "sending";
    this.error = "";
    this.abort = new AbortController();
    changed();
    try {
      let there = await this.put(token, new Blob([]), `bytes */${this.size}`);
      this.sent = there.received;
      const [began, first] = [performance.now(), this.sent];
      while (!there.complete) {
        const piece = await read(this.file, this.sent, Math.min(PIECE, this.size - this.sent));
        if (piece.byteLength === 0) throw refusal("io-error", T.vanished, T.vanishedRemedy);
        there = await this.put(token, piece, `bytes ${this.sent}-${this.sent + piece.byteLength - 1}/${this.size}`);
        this.sent = there.received;
        this.rate = (this.sent - first) * 1000 / Math.max(1, performance.now() - began);
        changed();
      }
      this.sum = String(there.sha256 ?? "");
      this.path = String(there.path ?? this.name);
      this.state = "done";
    } catch (error) {
      this.state = "stopped";
      this.error = this.abort.signal.aborted ? "" : /** @type {Error} */ (error).message;
    }
    changed();
    return this.state === "done";
  }

  /**
   * Send a piece; return what the server has.
   *
   * @param {string} token @param {BodyInit} body @param {string} range
   */
  async put(token, body, range) {
    const response = await fetch(`media/${encodeURIComponent(this.name)}`, {
      method: "PUT", body, headers: { Authorization: `Bearer ${token}`, "Content-Range": range, "Content-Type": "application/octet-stream" },
      signal: this.abort.signal,
    });
    const answer = await response.json().catch(() => ({}));
    if (response.ok || (response.status === 409 && "received" in answer)) return answer;
    const error = answer.error ?? {};
    throw new RequestError({ code: error.code ?? "io-error", message: [error.message ?? `the server answered ${response.status}`, error.remedy].filter(Boolean).join("; ") });
  }
}
