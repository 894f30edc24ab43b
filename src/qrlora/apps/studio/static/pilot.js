// Pilots: follow a stage while it runs, and add pictures or files of votes.
"use strict";

document.addEventListener("alpine:init", () => {
  Alpine.data("stage", () => ({
    init() {
      this.words = this.$root.dataset;
      this.source = new EventSource(`/train/${this.words.id}/events`);
      this.source.addEventListener("run", (event) => this.heard(JSON.parse(event.data)));
    },

    heard({ run, ahead, work }) {
      if (["stopped", "failed", "done"].includes(run.state)) {
        this.source.close();
        location.reload(); // the page has the report now, or why there is none
        return;
      }
      const card = document.querySelector("[data-busy]");
      if (card && run.state === "running") card.textContent = this.words.now;
      let text = this.words[run.state];
      if (run.state === "waiting" && ahead) text += ` · ${ahead} ${this.words.aheadWord}`;
      if (work) {
        const [verb, ...rest] = work.work.split(" ");
        text = [this.words[verb] || verb, ...rest].join(" ") + ` · ${work.at} / ${work.of}`;
        this.$refs.progress.value = work.at / work.of;
      }
      if (work || !this.told) this.$refs.state.textContent = text;
      this.told = this.told || Boolean(work);
    },
  }));

  Alpine.data("files", () => ({
    async picked(event) {
      this.$refs.trouble.textContent = "";
      let failed = false;
      for (const file of event.target.files) {
        const address = `${this.$root.dataset.place}?file=${encodeURIComponent(file.name)}`;
        const headers = { "X-CSRF-Token": csrf(), Accept: "application/part" };
        const answer = await fetch(address, { method: "POST", body: file, headers });
        if (!answer.ok) {
          failed = true;
          await tell(this.$refs.trouble, answer);
        }
      }
      event.target.value = "";
      if (!failed) location.reload();
    },
  }));
});
