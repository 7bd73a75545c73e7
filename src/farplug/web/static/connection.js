/**
 * The websocket to the page's server: requests with ids, replies, events, and the binary frames that follow messages with
 * the member `bytes`. One Connection is one websocket; whoever made it makes another when it has ended.
 */

const MAX_PENDING = 12;
/** The close code for a token that is not valid. */
export const BAD_TOKEN = 4401;
export const TOO_MANY_BAD_TOKENS = 4429;

/** An error that the server or the session sent: the fields of its remedy are fields here, too. */
export class RequestError extends Error {
  /** @param {Record<string, any>} fields `code`, `message`, perhaps `remedy`, `command`, `setting`, `value`, `alternative` */
  constructor(fields) {
    super(String(fields.message ?? ""));
    this.code = String(fields.code ?? "");
    /** @type {Record<string, any>} */
    this.fields = { ...fields, message: this.message };
  }
}

/**
 * @typedef {object} Listeners
 * @property {(name: string, data: any, bytes: ArrayBuffer | null) => void} onevent
 * @property {(code: number, reason: string) => void} onclose
 * @property {(milliseconds: number) => void} [onroundtrip] the time of a request that the server answers at once
 */

export class Connection {
  /** @param {string} url @param {Listeners} listeners */
  constructor(url, listeners) {
    this.listeners = listeners;
    /** @type {Map<number, {resolve: (value: any) => void, reject: (error: Error) => void, began: number, quick: boolean}>} */
    this.pending = new Map();
    /** @type {(() => void)[]} */
    this.waiting = [];
    this.lastId = 0;
    /** @type {any} the message whose bytes come next */
    this.header = null;
    /** @type {Promise<void> | null} messages before those that come now, which are being decoded */
    this.decoding = null;
    this.closed = false;
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    /** @type {Promise<void>} */
    this.opened = new Promise((resolve) => { this.socket.onopen = () => resolve(); });
    this.socket.onmessage = (event) => this.received(event.data);
    this.socket.onclose = (event) => this.ended(event.code, event.reason);
  }

  /**
   * Send a request; return its result.
   *
   * @param {string} method
   * @param {Record<string, any>} [params]
   * @param {ArrayBuffer | null} [bytes] that follow the request
   * @returns {Promise<any>}
   */
  request(method, params = {}, bytes = null) {
    return new Promise((resolve, reject) => {
      const send = () => {
        if (this.closed) {
          reject(new RequestError({ code: "gone", message: "the connection to the page's server ended" }));
          return;
        }
        const id = ++this.lastId;
        this.pending.set(id, { resolve, reject, began: performance.now(), quick: QUICK.has(method) });
        const message = { id, method, params };
        this.socket.send(JSON.stringify(bytes === null ? message : { ...message, bytes: bytes.byteLength }));
        if (bytes !== null) this.socket.send(bytes);
      };
      if (this.pending.size < MAX_PENDING) send();
      else this.waiting.push(send);
    });
  }

  /** End the connection. Pending requests fail. */
  close() {
    this.socket.close(1000);
  }

  /** @param {string | ArrayBuffer} frame */
  received(frame) {
    if (typeof frame !== "string") {
      const header = this.header;
      this.header = null;
      if (header === null || header.bytes !== frame.byteLength) this.socket.close(4400, "unexpected binary frame");
      else this.deliver(header, frame);
      return;
    }
    const message = JSON.parse(frame);
    if (this.header !== null) this.socket.close(4400, "a binary frame is missing");
    else if (typeof message.bytes === "number") this.header = message;
    else this.deliver(message, null);
  }

  /**
   * Handle a message, decoded, and after those before it.
   *
   * @param {any} message @param {ArrayBuffer | null} bytes
   */
  deliver(message, bytes) {
    const encoded = bytes !== null && message.encoding !== undefined;
    if (!encoded && this.decoding === null) {
      this.handle(message, bytes);
      return;
    }
    const decoding = this.decode(this.decoding, message, encoded ? decoded(/** @type {ArrayBuffer} */ (bytes), message.encoding) : bytes)
      .finally(() => { if (this.decoding === decoding) this.decoding = null; });
    this.decoding = decoding;
  }

  /** @param {Promise<void> | null} before @param {any} message @param {ArrayBuffer | null | Promise<ArrayBuffer>} bytes */
  async decode(before, message, bytes) {
    try {
      const [plain] = await Promise.all([bytes, before]);
      this.handle(message, plain);
    } catch (error) {
      this.socket.close(4400, "a message cannot be decoded");
      reportError(error);
    }
  }

  /** @param {any} message @param {ArrayBuffer | null} bytes */
  handle(message, bytes) {
    if (typeof message.event === "string") {
      this.listeners.onevent(message.event, message.data ?? {}, bytes);
      return;
    }
    const request = this.pending.get(message.id);
    if (request === undefined) return;
    this.pending.delete(message.id);
    this.waiting.shift()?.();
    if (request.quick) this.listeners.onroundtrip?.(performance.now() - request.began);
    if (message.ok) request.resolve(message.result);
    else request.reject(new RequestError(message.error ?? {}));
  }

  /** @param {number} code @param {string} reason */
  ended(code, reason) {
    this.closed = true;
    const waiting = this.waiting.splice(0);
    for (const send of waiting) send();
    for (const { reject } of this.pending.values()) {
      reject(new RequestError({ code: "gone", message: "the connection to the page's server ended" }));
    }
    this.pending.clear();
    this.listeners.onclose(code, reason);
  }
}

/** How the bytes of a message may be encoded: names that DecompressionStream has. */
export const ENCODINGS = typeof DecompressionStream === "function" ? ["deflate"] : [];

/** @param {ArrayBuffer} bytes @param {CompressionFormat} encoding */
async function decoded(bytes, encoding) {
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream(encoding))).arrayBuffer();
}

/** Methods that are answered at once: the time that they take is the way there and back. */
const QUICK = new Set(["screen-ack", "pointer", "key", "keys-up"]);
