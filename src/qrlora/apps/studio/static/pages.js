// Train, explore and prove.
"use strict";

const CORNER = 0.16; // of the canvas: how near to a corner of the square one has to begin to change its size

/** "12 s", "3 min". */
function spell(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

document.addEventListener("alpine:init", () => {
  Alpine.data("drop", () => ({
    over() {
      this.$refs.zone.classList.add("over");
    },
    away() {
      this.$refs.zone.classList.remove("over");
    },
    dropped(event) {
      this.away();
      this.take(event.dataTransfer.files);
    },
    picked(event) {
      this.take(event.target.files).then(() => (event.target.value = ""));
    },
    async take(files) {
      this.$refs.trouble.textContent = "";
      for (const file of files) {
        const options = { method: "POST", body: file, headers: { "X-CSRF-Token": csrf(), Accept: "application/part" } };
        const answer = await fetch(`/train/pictures?name=${encodeURIComponent(file.name)}`, options);
        if (!answer.ok) await tell(this.$refs.trouble, answer);
        else this.$refs.pictures.insertAdjacentHTML("beforeend", await answer.text());
      }
      fillAll();
    },
    roleChanged(event) {
      this.$refs.trigger.value = event.target.dataset.trigger;
    },
  }));

  Alpine.data("crop", () => ({
    init() {
      const { token, width, height } = this.$root.dataset;
      this.token = token;
      this.size = [Number(width), Number(height)];
      this.mask = null;
      this.brushing = false;
      this.image = new Image();
      this.image.onload = () => {
        const scale = 480 / Math.max(...this.size);
        [this.$refs.view.width, this.$refs.view.height] = this.size.map((side) => Math.round(side * scale));
        this.draw();
      };
      this.image.src = `/train/pictures/${token}.png`;
    },

    /** Left, top and side of the square on the canvas. */
    square() {
      const view = this.$refs.view;
      const side = Number(this.$refs.side.value) * Math.min(view.width, view.height);
      return [Number(this.$refs.x.value) * (view.width - side), Number(this.$refs.y.value) * (view.height - side), side];
    },

    draw() {
      const view = this.$refs.view;
      const pen = view.getContext("2d");
      pen.drawImage(this.image, 0, 0, view.width, view.height);
      if (this.mask) {
        pen.globalAlpha = 0.45;
        pen.drawImage(this.tinted(), 0, 0, view.width, view.height);
        pen.globalAlpha = 1;
      }
      const [left, top, side] = this.square();
      pen.fillStyle = "rgb(18 17 16 / 0.6)";
      pen.beginPath();
      pen.rect(0, 0, view.width, view.height);
      pen.rect(left, top, side, side);
      pen.fill("evenodd");
      pen.strokeStyle = "white";
      pen.lineWidth = 2;
      pen.strokeRect(left + 1, top + 1, side - 2, side - 2);
    },

    /** The mask in the accent colour: what is painted is white on nothing. */
    tinted() {
      const tint = document.createElement("canvas");
      [tint.width, tint.height] = [this.mask.width, this.mask.height];
      const pen = tint.getContext("2d");
      pen.drawImage(this.mask, 0, 0);
      pen.globalCompositeOperation = "source-in";
      pen.fillStyle = getComputedStyle(this.$refs.view).color;
      pen.fillRect(0, 0, tint.width, tint.height);
      return tint;
    },

    at(event) {
      const view = this.$refs.view;
      const box = view.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * view.width, ((event.clientY - box.top) / box.height) * view.height];
    },

    begin(event) {
      this.$refs.view.setPointerCapture(event.pointerId);
      const [x, y] = (this.last = this.at(event));
      const [left, top, side] = this.square();
      const near = CORNER * side;
      this.resizing = Math.abs(x - left - side) < near && Math.abs(y - top - side) < near;
      this.dragging = true;
      if (this.brushing) this.paint(x, y);
    },

    move(event) {
      if (!this.dragging) return;
      const [x, y] = this.at(event);
      const [dx, dy] = [x - this.last[0], y - this.last[1]];
      if (this.brushing) this.paint(x, y);
      else this.shift(dx, dy);
      this.last = [x, y];
    },

    shift(dx, dy) {
      const view = this.$refs.view;
      const [left, top, side] = this.square();
      const least = Math.min(view.width, view.height);
      const wanted = this.resizing ? Math.min(least, Math.max(0.2 * least, side + Math.max(dx, dy))) : side;
      const place = (value, whole) => (whole > wanted ? Math.min(1, Math.max(0, value / (whole - wanted))) : 0.5);
      this.$refs.side.value = wanted / least;
      this.$refs.x.value = place(left + (this.resizing ? 0 : dx), view.width);
      this.$refs.y.value = place(top + (this.resizing ? 0 : dy), view.height);
      this.adjusted();
    },

    async end() {
      if (!this.dragging) return;
      this.dragging = false;
      if (this.brushing && this.mask) await this.sendMask();
    },

    adjusted() {
      this.$refs.crop.value = [this.$refs.x.value, this.$refs.y.value, this.$refs.side.value].join(",");
      for (const slider of [this.$refs.x, this.$refs.y, this.$refs.side]) fill(slider);
      this.draw();
    },

    paint(x, y) {
      if (!this.mask) {
        this.mask = document.createElement("canvas");
        [this.mask.width, this.mask.height] = [this.$refs.view.width, this.$refs.view.height];
        this.$refs.clear.hidden = false;
      }
      const pen = this.mask.getContext("2d");
      pen.strokeStyle = "white";
      pen.lineCap = "round";
      pen.lineWidth = 2 * Number(this.$refs.brush.value) * this.mask.width;
      pen.beginPath();
      pen.moveTo(...this.last);
      pen.lineTo(x, y);
      pen.stroke();
      this.draw();
    },

    async sendMask() {
      const flat = document.createElement("canvas");
      [flat.width, flat.height] = [this.mask.width, this.mask.height];
      const pen = flat.getContext("2d");
      pen.fillRect(0, 0, flat.width, flat.height);
      pen.drawImage(this.mask, 0, 0);
      const body = await new Promise((done) => flat.toBlob(done, "image/png"));
      await fetch(`/train/pictures/${this.token}/mask`, { method: "POST", body, headers: { "X-CSRF-Token": csrf() } });
    },

    async clearMask() {
      this.mask.getContext("2d").fillStyle = "white";
      this.mask.getContext("2d").fillRect(0, 0, this.mask.width, this.mask.height);
      await this.sendMask();
      this.mask = null;
      this.$refs.clear.hidden = true;
      this.draw();
    },

    toCrop() {
      this.choose(false);
    },
    toBrush() {
      this.choose(true);
    },
    choose(brushing) {
      this.brushing = brushing;
      this.$root.classList.toggle("brushing", brushing);
      this.$refs.cropTool.ariaPressed = String(!brushing);
      this.$refs.brushTool.ariaPressed = String(brushing);
      this.$refs.cropHint.hidden = brushing;
      this.$refs.brushHint.hidden = this.$refs.brushLabel.hidden = !brushing;
    },
    remove() {
      this.$root.remove();
    },
  }));

  Alpine.data("run", () => ({
    points: [],
    samples: [],
    shown: null,
    following: true,

    init() {
      this.words = this.$root.dataset;
      this.source = new EventSource(`/train/${this.words.id}/events`);
      this.source.addEventListener("open", () => (this.points = [])); // after a break all of it is told again
      this.source.addEventListener("run", (event) => this.heard(JSON.parse(event.data)));
    },

    heard({ run, ahead, points, left, samples, notes }) {
      this.points.push(...points);
      if (notes.length) this.$refs.note.textContent = notes[notes.length - 1];
      for (const step of samples) if (!this.samples.includes(step)) this.addSample(step);
      this.say(run, ahead, left);
      this.plot();
      const over = ["stopped", "failed", "done"].includes(run.state);
      if (over) this.source.close();
      this.$refs.stop.hidden = over;
      this.$refs.resume.hidden = !["stopped", "failed"].includes(run.state);
      this.$refs.use.hidden = run.state !== "done";
      this.$refs.forget.hidden = !over;
      this.$refs.error.hidden = !run.error;
      this.$refs.error.textContent = run.error;
    },

    say(run, ahead, left) {
      const done = this.points.length ? this.points[this.points.length - 1][0] : 0;
      this.$refs.progress.value = run.state === "done" ? run.steps : done;
      let text = this.words[run.state];
      if (run.state === "waiting" && ahead) text += ` · ${ahead} ${this.words.aheadWord}`;
      if (run.state === "running") {
        text = done ? `${done} / ${run.steps}` : this.words.loadingWord;
        if (left !== null) this.leftText = ` · ${spell(left)} ${this.words.leftWord}`;
        if (done) text += this.leftText || "";
      }
      this.$refs.state.textContent = text;
      if (!this.samples.length) this.$refs.veil.textContent = text;
    },

    addSample(step) {
      this.samples.push(step);
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.ariaLabel = `${this.words.stepWord} ${step}`;
      button.onclick = () => this.jump(this.samples.indexOf(step));
      const image = document.createElement("img");
      Object.assign(image, { src: `/train/${this.words.id}/steps/${step}.png`, alt: "" });
      button.append(image);
      item.append(button);
      this.$refs.strip.append(item);
      this.$refs.scrub.max = this.samples.length - 1;
      if (this.following) this.show(this.samples.length - 1);
    },

    jump(place) {
      this.following = place === this.samples.length - 1;
      this.show(place);
    },

    scrubbed() {
      this.jump(Number(this.$refs.scrub.value));
    },

    show(place) {
      this.shown = this.samples[place];
      this.$refs.scrub.value = place;
      fill(this.$refs.scrub);
      this.$refs.picture.src = `/train/${this.words.id}/steps/${this.shown}.png`;
      this.$refs.picture.alt = this.$refs.caption.textContent = `${this.words.stepWord} ${this.shown}`;
      this.$refs.figure.dataset.stage = "refined";
      this.$refs.veil.textContent = "";
      this.$refs.take.hidden = !this.shown;
      [...this.$refs.strip.querySelectorAll("button")].forEach((one, i) => (one.ariaPressed = String(i === place)));
    },

    addStep(event) {
      event.detail.parameters.step = this.shown;
    },

    /** The loss as it is, and smoothed, over all steps. */
    plot() {
      if (!this.points.length) return;
      const values = this.points.map((point) => point[1]);
      const most = Math.max(...values);
      let mean = values[0];
      const smooth = values.map((value) => (mean += 0.08 * (value - mean)));
      const line = (heights) =>
        this.points.map(([step], i) => `${(300 * step) / this.words.steps},${108 - (100 * heights[i]) / most}`).join(" ");
      this.$refs.raw.setAttribute("points", line(values));
      this.$refs.smooth.setAttribute("points", line(smooth));
      this.$refs.loss.textContent = smooth[smooth.length - 1].toFixed(3);
    },
  }));

  Alpine.data("explore", () => ({
    ...following,
    members: [],

    async init() {
      this.$root.addEventListener("click", (event) => this.clicked(event));
      this.$root.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") this.clicked(event);
      });
      if (this.$root.dataset.ready) await this.becomeLive();
      else this.$refs.veil.textContent = this.$refs.veil.dataset.loading;
    },

    async becomeLive() {
      if (this.live) return;
      this.live = true;
      const headers = { Accept: "application/part" };
      const answer = await fetch(`/explore/space?role=${this.$root.dataset.role}`, { headers });
      this.$refs.veil.textContent = "";
      await tell(this.$refs.space, answer);
      const space = this.$refs.space.querySelector("[data-members]");
      if (!space) return;
      htmx.process(space);
      this.members = JSON.parse(space.dataset.members);
      this.$refs.prompt.value = space.dataset.prompt;
      this.tell();
      await this.preview();
    },

    changeRole(event) {
      location.search = `?role=${event.target.value}`;
    },

    sliders() {
      return [...this.$refs.space.querySelectorAll("[data-component]")];
    },

    point() {
      return this.sliders().map((slider) => Number(slider.value));
    },

    mean() {
      return Number(this.$refs.space.querySelector("[data-mean]").value);
    },

    /** Weights of the members whose sum is the point. */
    composition() {
      const n = this.members.length;
      const point = this.point();
      const weight = (member) => this.mean() / n + member.z.reduce((sum, z, k) => sum + (point[k] * z) / n, 0);
      return this.members.map((member) => `${member.key}:${weight(member).toFixed(4)}`).join(",");
    },

    strength() {
      return 0;
    },

    changed(event) {
      if (event.target.dataset.name !== undefined || event.target.name === "role") return;
      this.tell();
      this.later();
    },

    /** Numbers beside the sliders, and the place on the map. */
    tell() {
      for (const slider of this.$refs.space.querySelectorAll("input[type=range]"))
        slider.nextElementSibling.textContent = Number(slider.value).toFixed(2);
      const [x, y] = [...this.point(), 0, 0];
      const here = this.$refs.space.querySelector(".here");
      here.setAttribute("cx", x);
      here.setAttribute("cy", -y);
      this.$refs.space.querySelector("[data-z]").value = this.point().join(",");
      this.$refs.space.querySelector("[data-m]").value = this.mean();
      fillAll();
    },

    clicked(event) {
      const member = event.target.closest("[data-place]");
      if (!member && !event.target.closest("[data-home]")) return;
      event.preventDefault();
      const z = member ? this.members[Number(member.dataset.place)].z : [];
      this.sliders().forEach((slider, k) => (slider.value = z[k] || 0));
      this.tell();
      this.later();
    },
  }));

  Alpine.data("brand", () => ({
    async read(event) {
      const [file] = event.target.files;
      this.$refs.sheet.value = file ? await file.text() : "";
    },
  }));

  Alpine.data("vote", () => ({
    key(event) {
      const button = this.$root.querySelector(`[data-vote=${event.key}]`);
      if (!button) return;
      event.preventDefault();
      button.click();
    },
  }));
});
