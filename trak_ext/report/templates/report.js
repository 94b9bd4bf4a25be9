"use strict";
(() => {
  const main = document.getElementById("targets");
  const targets = [...main.querySelectorAll(".target")];
  const find = document.getElementById("find");
  const label = document.getElementById("label"); // null where there is nothing to choose
  const order = document.getElementById("order");
  const count = document.getElementById("count");
  const nothing = main.querySelector(".nothing");
  const words = new Map(
    targets.map((t) => [t, t.querySelector(".subject").textContent.toLowerCase()]),
  );
  const place = new Map(targets.map((t, i) => [t, i]));
  const number = (text, missing) => (text === "" ? missing : Number(text));
  const compare = {
    given: () => 0,
    label: (a, b) => a.dataset.label.localeCompare(b.dataset.label, "en", { numeric: true }),
    top: (a, b) => number(b.dataset.top, -Infinity) - number(a.dataset.top, -Infinity),
    lds: (a, b) => number(a.dataset.lds, 2) - number(b.dataset.lds, 2),
    wrong: (a, b) => b.dataset.wrong - a.dataset.wrong,
  };

  function search() {
    const asked = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const target of targets) {
      const labelled = !label?.selectedIndex || label.value === target.dataset.label;
      target.hidden = !labelled || !asked.every((word) => words.get(target).includes(word));
      shown += !target.hidden;
    }
    nothing.hidden = shown > 0;
    count.textContent = `${shown} of ${targets.length} targets`;
  }

  function sort() {
    const by = compare[order.value];
    const sorted = [...targets].sort((a, b) => by(a, b) || place.get(a) - place.get(b));
    main.prepend(...sorted);
  }

  find.addEventListener("input", search);
  label?.addEventListener("change", search);
  order.addEventListener("change", sort);
  // A reload may bring back what had been typed.
  search();
  sort();
  document.querySelector(".controls").hidden = false;
})();
