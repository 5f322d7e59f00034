"use strict";
{
  const byId = (id) => document.getElementById(id);
  const details = JSON.parse(byId("details").textContent);
  const cells = [...document.querySelectorAll(".cell")];
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  // One result, larger.
  const dialog = byId("detail");
  let current = 0;
  const fill = (id, text) => { if (byId(id)) byId(id).textContent = text ?? ""; };
  const open = (number) => {
    current = (number + cells.length) % cells.length;
    const cell = cells[current], detail = details[cell.dataset.result], picture = cell.querySelector("img");
    const isolated = document.createElement("bdi");
    isolated.textContent = cell.ariaLabel;
    byId("detail-name").replaceChildren(isolated);
    byId("stage").replaceChildren();
    if (cell.dataset.clip) {
      const video = document.createElement("video");
      Object.assign(video, { src: cell.dataset.clip, poster: picture.src, muted: true, loop: true, autoplay: !still, controls: true, playsInline: true });
      byId("stage").append(video);
    } else if (picture) {
      const larger = document.createElement("img");
      Object.assign(larger, { src: picture.src, alt: cell.ariaLabel });
      byId("stage").append(larger);
    }
    fill("reason", detail.reason);
    byId("reason").hidden = !detail.reason;
    fill("file", detail.file);
    byId("file").href = detail.href ?? "";
    byId("place").hidden = !detail.file;
    byId("facts")?.replaceChildren(...detail.facts.map(([name, text]) => {
      const row = document.createElement("tr"), head = document.createElement("th"), value = document.createElement("td");
      const isolated = document.createElement("bdi");
      head.scope = "row";
      head.textContent = name;
      isolated.textContent = text;
      value.append(isolated);
      row.append(head, value);
      return row;
    }));
    fill("whole", detail.whole);
    fill("repeat", detail.repeat);
    if (byId("again")) byId("again").hidden = !detail.repeat;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  cells.forEach((cell, number) => cell.addEventListener("click", () => open(number)));
  byId("close").addEventListener("click", () => dialog.close());
  byId("previous").addEventListener("click", () => open(current - 1));
  byId("next").addEventListener("click", () => open(current + 1));
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && event.target.tagName !== "VIDEO") open(current + step); // which seeks
  });
  dialog.addEventListener("close", () => {
    byId("stage").replaceChildren();
    cells[current].focus();
  });

  // All clips from their first frame on; shorter ones wait for the longest with their last frame.
  const button = byId("together");
  let playing = [], keeper;
  const start = () => playing.forEach((video) => { video.currentTime = 0; video.playbackRate = 1; video.play(); });
  const stop = () => {
    clearInterval(keeper);
    for (const video of playing) {
      const cell = video.parentElement;
      delete cell.dataset.held;
      video.remove();
      cell.querySelector("img").hidden = false;
    }
    playing = [];
  };
  const play = async () => {
    const loaded = cells.filter((cell) => cell.dataset.clip).map((cell) => new Promise((resolve) => {
      const picture = cell.querySelector("img"), video = document.createElement("video");
      cell.dataset.held = ""; // from playing by itself
      cell.querySelector("video")?.remove();
      picture.hidden = false;
      video.style.width = `${picture.clientWidth}px`;
      video.style.height = `${picture.clientHeight}px`;
      Object.assign(video, { muted: true, playsInline: true, preload: "auto", src: cell.dataset.clip });
      video.addEventListener("canplaythrough", resolve, { once: true });
      video.addEventListener("error", resolve, { once: true });
      picture.hidden = true;
      picture.after(video);
      playing.push(video);
    }));
    const mine = playing;
    await Promise.all(loaded);
    if (playing !== mine) return; // stopped meanwhile
    const longest = playing.reduce((one, other) => ((other.duration || 0) > (one.duration || 0) ? other : one));
    longest.addEventListener("ended", start);
    start();
    keeper = setInterval(() => { // a busy machine starts some later: they catch up
      for (const video of playing) video.playbackRate = Math.min(2, Math.max(.5, 1 + longest.currentTime - video.currentTime));
    }, 200);
  };
  button?.addEventListener("click", () => {
    const pressed = button.ariaPressed !== "true";
    button.ariaPressed = String(pressed);
    if (pressed) play(); else stop();
  });
}
