"use strict";

// A page that is opened from disk may start no worker, which is what the search runs in: its script
// runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      this.inner.postMessage = (data) => this.tell(this, data);
      const script = this.inner.document.createElement("script");
      script.src = url;
      this.loaded = new Promise((resolve) => { script.onload = resolve; });
      this.inner.document.head.append(script);
    }

    postMessage(data) { this.loaded.then(() => this.tell(this.inner, data)); }

    /** Dispatches a copy of the data, later, as a worker does. */
    tell(to, data) {
      const copy = structuredClone(data);
      setTimeout(() => to.dispatchEvent(new MessageEvent("message", { data: copy })));
    }
  };
}
