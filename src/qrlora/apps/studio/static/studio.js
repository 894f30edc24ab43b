// What all pages share, and the mix. No inline script, no eval: Alpine's CSP build calls the methods registered here.
"use strict";

const DEBOUNCE_MS = 90;

function csrf() {
  return document.querySelector("meta[name=csrf]").content;
}

/** Put the words of a failed answer where they belong. */
async function tell(place, response) {
  place.innerHTML = await response.text(); // a part rendered by the server, everything in it escaped
}

/** Draw a slider in colour, from its zero (or its left end) to its value. */
function fill(slider) {
  const [least, most] = [Number(slider.min), Number(slider.max)];
  const share = (value) => (100 * (value - least)) / (most - least || 1);
  const ends = [share(Math.max(0, least)), share(Number(slider.value))].sort((a, b) => a - b);
  slider.style.setProperty("--from", `${ends[0]}%`);
  slider.style.setProperty("--to", `${ends[1]}%`);
}

function fillAll() {
  document.querySelectorAll("input[type=range]").forEach(fill);
}

document.addEventListener("input", (event) => event.target.type === "range" && fill(event.target));
document.addEventListener("DOMContentLoaded", fillAll);
document.addEventListener("htmx:afterSettle", fillAll);

/**
 * Pictures that follow what is set: first with few steps, then refined; a newer wish ends an older one.
 * Whoever uses it has composition(), strength(), seed, and the refs figure, picture, veil, caption, trouble, prompt.
 */
const following = {
  tab: Math.random().toString(36).slice(2),
  live: false,
  timer: 0,
  asked: null,
  seed: 0,

  later() {
    clearTimeout(this.timer);
    this.stopped = performance.now();
    if (this.asked) this.asked.abort();
    this.timer = setTimeout(() => this.preview(), DEBOUNCE_MS);
  },

  query(composition, seed, stage) {
    return new URLSearchParams({ c: composition, n: this.strength(), p: this.$refs.prompt.value, s: seed, stage });
  },

  async preview() {
    if (!this.live) return;
    const started = this.stopped || performance.now();
    const asked = (this.asked = new AbortController());
    const composition = this.composition();
    const figure = this.$refs.figure;
    figure.classList.add("busy");
    this.$refs.trouble.textContent = "";
    if (!this.$refs.picture.src) this.$refs.veil.textContent = this.$refs.veil.dataset.making;
    try {
      for (const stage of ["first", "refined"]) {
        const query = this.query(composition, this.seed, stage);
        query.set("page", this.tab);
        if (!(await this.show(await fetch(`/picture.png?${query}`, { signal: asked.signal }), stage, started))) break;
        if (stage === "first" && this.about) this.about();
      }
      figure.classList.remove("busy");
      if (this.variations) await this.variations(composition, asked.signal);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  },

  async show(answer, stage, started) {
    if (!answer.ok) {
      await tell(this.$refs.trouble, answer);
      return false;
    }
    const url = URL.createObjectURL(await answer.blob());
    const image = this.$refs.picture;
    const old = image.src;
    image.src = url;
    await image.decode();
    if (old) URL.revokeObjectURL(old);
    this.$refs.veil.textContent = "";
    const seconds = (performance.now() - started) / 1000;
    const figure = this.$refs.figure;
    const shown = this.before ? "before" : stage;
    figure.dataset.stage = shown;
    figure.dataset[stage] = seconds.toFixed(3);
    const words = this.$refs.caption.dataset;
    this.$refs.caption.textContent = `${words[shown]} · ${seconds.toFixed(1)} ${words.seconds}`;
    image.alt = this.$refs.prompt.value;
    if (this.shown) this.shown(url);
    return true;
  },
};

document.addEventListener("alpine:init", () => {
  Alpine.data("mix", () => ({
    ...following,
    before: false,
    promptIsOurs: true,
    aboutOf: null,
    searching: "",

    init() {
      this.promptIsOurs = !this.$refs.prompt.value;
      this.spaceIsOurs = !this.$root.dataset.nullSpace;
      this.readCards();
      this.about();
      if (this.$root.dataset.ready) this.becomeLive();
      else this.$refs.veil.textContent = this.$refs.veil.dataset.loading;
    },

    async becomeLive() {
      if (this.live) return;
      this.live = true;
      this.$refs.veil.textContent = "";
      this.aboutOf = null; // interference is known only now
      if (!this.$root.dataset.ready) await this.reloadCards();
      this.suggest();
      await this.preview();
      this.loadThumbs();
    },

    async reloadCards() {
      const answer = await fetch(`/mix/cards?c=${encodeURIComponent(this.spelt())}`);
      if (answer.ok) document.getElementById("cards").innerHTML = await answer.text();
      this.readCards();
    },

    /** Thumbnails that have to be made come one by one, when nothing else is asked for. */
    async loadThumbs() {
      for (const image of this.$root.querySelectorAll(".card img[data-src]:not([src])")) {
        await new Promise((next) => {
          image.onload = image.onerror = next;
          image.src = image.dataset.src;
        });
      }
    },

    cards() {
      return [...this.$root.querySelectorAll(".card")];
    },

    weightOf(card) {
      return Number(card.querySelector("[data-weight]").value);
    },

    readCards() {
      for (const card of this.cards()) {
        const weight = this.weightOf(card);
        card.classList.toggle("on", weight > 0);
        card.querySelector("output").textContent = weight.toFixed(2);
      }
      this.$refs.nullSpace.nextElementSibling.textContent = Number(this.$refs.nullSpace.value).toFixed(2);
      fillAll();
    },

    chosen() {
      return this.cards().filter((card) => this.weightOf(card) > 0);
    },

    spelt() {
      return this.chosen().map((card) => `${card.dataset.key}:${this.weightOf(card)}`).join(",");
    },

    composition() {
      return this.before ? "" : this.spelt();
    },

    strength() {
      return this.$refs.nullSpace.value;
    },

    shown(url) {
      this.$root.querySelector(".seed[aria-pressed=true] img").src = url;
    },

    changed(event) {
      if (event.target.closest(".keep")) return;
      if (event.target.dataset.search !== undefined) return this.find(event.target.value);
      if (event.target === this.$refs.prompt) this.promptIsOurs = !this.$refs.prompt.value;
      if (event.target === this.$refs.nullSpace) this.spaceIsOurs = false;
      this.readCards();
      this.suggest();
      this.later();
    },

    find(text) {
      const wanted = text.toLowerCase();
      for (const card of this.cards()) {
        const known = `${card.dataset.title} ${card.dataset.trigger} ${card.dataset.role}`.toLowerCase();
        card.hidden = !known.includes(wanted) && !this.weightOf(card);
      }
    },

    clear() {
      for (const card of this.cards()) card.querySelector("[data-weight]").value = 0;
      this.readCards();
      this.suggest();
      this.later();
    },

    /** The prompt and the strength that go with what is chosen, until somebody writes their own. */
    suggest() {
      const chosen = this.chosen();
      const roles = chosen.map((card) => card.dataset.role).sort().join();
      if (this.spaceIsOurs) {
        this.$refs.nullSpace.value = roles === "style,subject" ? 0.5 : 0;
        this.readCards();
      }
      if (!this.promptIsOurs) return;
      const subject = chosen.find((card) => card.dataset.role === "subject");
      const style = chosen.find((card) => card.dataset.role === "style");
      const prompt = subject ? subject.dataset.caption : style ? style.dataset.caption : "a photo of a red mug";
      const drawn = style ? ` in ${style.dataset.trigger} style` : "";
      this.$refs.prompt.value = subject && style ? prompt.replace(/ in [\w<> ]+ style.*$/, "") + drawn : prompt;
    },

    /** Small pictures of the other seeds, once the large one is done. */
    async variations(composition, signal) {
      for (const button of this.$root.querySelectorAll(".seed")) {
        if (Number(button.dataset.seed) === this.seed) continue;
        const answer = await fetch(`/picture.png?${this.query(composition, button.dataset.seed, "first")}`, { signal });
        if (!answer.ok) return;
        button.querySelector("img").src = URL.createObjectURL(await answer.blob());
      }
    },

    pick(event) {
      const button = event.target.closest(".seed");
      for (const other of this.$root.querySelectorAll(".seed")) other.ariaPressed = String(other === button);
      this.seed = Number(button.dataset.seed);
      this.later();
    },

    reseed() {
      const first = Math.floor(Math.random() * 1e6);
      this.$root.querySelectorAll(".seed").forEach((button, place) => {
        button.dataset.seed = first + place;
        if (button.ariaPressed === "true") this.seed = first + place;
      });
      this.later();
    },

    toggleBefore() {
      this.before = !this.before;
      this.$refs.before.ariaPressed = String(this.before);
      this.later();
    },

    async about() {
      const query = new URLSearchParams({ c: this.spelt(), n: this.$refs.nullSpace.value });
      if (this.aboutOf === String(query)) return;
      this.aboutOf = String(query);
      const answer = await fetch(`/mix/about?${query}`);
      if (answer.ok) this.$refs.about.innerHTML = await answer.text();
    },

    async openGrid() {
      this.$refs.grid.textContent = "";
      this.$refs.dialog.showModal();
      const answer = await fetch(`/mix/grid?${this.query(this.spelt(), this.seed, "")}`, { headers: { Accept: "application/part" } });
      await tell(this.$refs.grid, answer);
    },

    takeCell(event) {
      const wanted = new Map(event.target.closest(".cell").dataset.mix.split(",").map((part) => part.split(":")));
      for (const card of this.cards()) card.querySelector("[data-weight]").value = wanted.get(card.dataset.key) || 0;
      this.$refs.dialog.close();
      this.readCards();
      this.later();
    },

    addMix(event) {
      Object.assign(event.detail.parameters, { c: this.spelt(), n: this.$refs.nullSpace.value });
    },
  }));
});
