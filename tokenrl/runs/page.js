// Sorts and filters the completions of a page. Without it they are all shown, by step.
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
