// Keys press the buttons of the page; a picture that is clicked fills the window.
(() => {
  const element = (id) => document.getElementById(id);
  const buttons = () => [...document.querySelectorAll("#choices button")];
  const isSeen = (own) => own && own.offsetParent !== null && !own.disabled;
  const press = (own) => isSeen(own) && own.click();
  const shrink = () => document.querySelectorAll("img.large").forEach((own) => own.classList.remove("large"));

  function move(by) {
    const own = buttons();
    const at = own.indexOf(document.activeElement);
    const next = at < 0 ? (by > 0 ? 0 : own.length - 1) : (at + by + own.length) % own.length;
    own[next]?.focus();
  }

  function act(key) {
    const own = buttons();
    const isPair = own.length === 3;
    const number = Number(key);
    if (number >= 1 && number <= own.length) press(own[number - 1]);
    else if (key === "Backspace" || key === "u" || key === "U") press(element("undo"));
    else if (key === "ArrowLeft") isPair ? press(own[0]) : move(-1);
    else if (key === "ArrowRight") isPair ? press(own[2]) : move(1);
    else if (isPair && key === "ArrowDown") press(own[1]);
    else if (key === "Escape") shrink();
    else return false;
    return true;
  }

  document.addEventListener("keydown", (event) => {
    const isTyped = event.target.closest?.("input, textarea");
    if (isTyped || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (isSeen(buttons()[0]) || isSeen(element("undo"))) {
      if (act(event.key)) event.preventDefault();
    }
  });

  document.addEventListener("click", (event) => {
    if (event.target.matches?.(".pictures img")) event.target.classList.toggle("large");
    else if (event.target.closest?.("#choices, #undo")) shrink();
  });
})();
