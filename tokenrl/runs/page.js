// Sorts and filters the completions of a page, and colours their tokens. Without it they are all shown, by step.
for (const samples of document.querySelectorAll(".samples")) {
  const form = samples.querySelector("form"), list = samples.querySelector(".list");
  const items = [...list.children].map((element) => ({
    element,
    numbers: JSON.parse(element.dataset.numbers),
    text: element.querySelector(".texts").textContent.toLowerCase(),
  }));
  const names = new Set(items.flatMap((item) => Object.keys(item.numbers)));
  for (const select of [form.elements.by, form.elements.column]) {
    select.append(...[...names].map((name) => new Option(name)));
  }
  const update = () => {
    const { search, by, order, column, least, most } = form.elements;
    const sign = order.value === "descending" ? -1 : 1;
    const value = (item, name) => item.numbers[name] ?? NaN;
    const within = (item) =>
      (least.value === "" || value(item, column.value) >= Number(least.value)) &&
      (most.value === "" || value(item, column.value) <= Number(most.value));
    // A missing number comes last in either order; equal ones keep the order of the file.
    const compare = (a, b) => {
      const [x, y] = [value(a, by.value), value(b, by.value)];
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0;
    };
    let shown = 0;
    for (const item of items) {
      item.element.hidden = !(item.text.includes(search.value.toLowerCase()) && within(item));
      shown += !item.element.hidden;
    }
    list.append(...[...items].sort(compare).map((item) => item.element));
    form.querySelector("output").value = `${shown} of ${items.length}`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
}

const colours = document.querySelector("form.colours");
const texts = [...document.querySelectorAll(".tokens")];
const tokens = texts.flatMap((text) => {
  const names = text.dataset.names.split(" ");
  return [...text.children].map((element) => {
    const values = element.dataset.values.split(" ").map(Number);
    return { element, numbers: Object.fromEntries(names.map((name, index) => [name, values[index]])) };
  });
});
if (tokens.length) {
  const names = new Set(tokens.flatMap((token) => Object.keys(token.numbers)));
  colours.elements.by.append(...[...names].map((name) => new Option(name)));
  colours.elements.by.value = "weight";
  const about = colours.querySelector("span");
  // A ratio is compared with 1; what is never positive, or never negative, has one colour.
  const level = (token, name) => (name === "ratio" ? Math.log(token.numbers.ratio) : token.numbers[name]);
  const paint = () => {
    const name = colours.elements.by.value;
    const sizes = tokens.map((token) => Math.abs(level(token, name))).filter(Number.isFinite).sort((a, b) => a - b);
    const most = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes.at(-1) || 1;
    for (const token of tokens) {
      const share = Math.min(1, Math.abs(level(token, name)) / most);
      const hue = level(token, name) < 0 ? "--low" : "--high";
      token.element.style.background = share > 0 ? `color-mix(in srgb, var(${hue}) ${Math.round(65 * share)}%, transparent)` : "";
    }
    const bound = name === "ratio" ? Math.exp(most) : most;
    about.textContent = `strongest from ${bound.toPrecision(3)} on, less than ${name === "ratio" ? 1 : 0} in orange`;
  };
  const reading = document.body.appendChild(document.createElement("output"));
  reading.className = "reading";
  const words = (token) =>
    Object.entries(token.numbers).map(([name, value]) => `${name} ${Number.isNaN(value) ? "-" : value}`).join(", ");
  const read = (token) => {
    const kind = token.element.className === "given" ? " (by the environment)" : "";
    reading.textContent = `${JSON.stringify(token.element.textContent)}${kind}  ${words(token)}`;
  };
  for (const token of tokens) {
    token.element.tabIndex = token.element.previousElementSibling ? -1 : 0;
    token.element.addEventListener("mouseenter", () => read(token));
    token.element.addEventListener("focus", () => read(token));
    token.element.addEventListener("mouseleave", () => (reading.textContent = ""));
    token.element.addEventListener("blur", () => (reading.textContent = ""));
    token.element.addEventListener("keydown", (event) => {
      const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      token.element[next]?.focus();
    });
  }
  colours.addEventListener("input", paint);
  colours.hidden = false;
  paint();
}
