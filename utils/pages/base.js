"use strict";
// A clip (an element with data-clip, the data URI of a video, around a picture) plays while the pointer or the focus is on it,
// but with data-held is left to whoever set that.
for (const clip of document.querySelectorAll("[data-clip]")) {
  const play = () => {
    if (clip.querySelector("video") || "held" in clip.dataset) return;
    const still = clip.querySelector("img"), video = document.createElement("video");
    Object.assign(video, { src: clip.dataset.clip, muted: true, loop: true, autoplay: true, playsInline: true });
    video.style.width = `${still.clientWidth}px`;
    video.style.height = `${still.clientHeight}px`;
    still.hidden = true;
    still.after(video);
  };
  const stop = () => {
    if (clip.matches(":hover") || clip.contains(document.activeElement) || "held" in clip.dataset) return;
    clip.querySelector("video")?.remove();
    clip.querySelector("img").hidden = false;
  };
  clip.addEventListener("pointerenter", play);
  clip.addEventListener("focusin", play);
  clip.addEventListener("pointerleave", () => setTimeout(stop));
  clip.addEventListener("focusout", () => setTimeout(stop));
}
// A button with data-copy copies the text of the element with that id.
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy), before = button.textContent;
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch { // where the clipboard is not allowed the text is selected at least
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  });
}
