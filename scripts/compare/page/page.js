// Hands the charts' specification to Vega-Lite, and says how wide the page is.
const specification = JSON.parse(document.getElementById("specification").textContent);
const figure = document.getElementById("charts");
const holder = figure.appendChild(document.createElement("div"));
const BESIDE = 48 + 10; // pixels: the labels of an axis, and half a label at the other end
const BETWEEN = 16;
let view, width;

async function draw() {
  if (figure.clientWidth === width) return;
  width = figure.clientWidth;
  const columns = width > 700 && specification.concat.length > 1 ? 2 : 1;
  specification.columns = columns;
  specification.spacing = { column: BESIDE + BETWEEN, row: 100 };
  const room = (width - (columns - 1) * BETWEEN) / columns;
  specification.config.view.continuousWidth = room - BESIDE;
  specification.config.title.limit = room;
  if (view) {
    // What was hidden or zoomed stays so when the page is turned or resized.
    for (const param of specification.params) if (!param.expr) param.value = view.signal(param.name);
    view.finalize();
    for (const id of ["legend", "tools"]) document.getElementById(id).replaceChildren();
  }
  const options = { mode: "vega-lite", renderer: "svg", actions: false };
  view = (await vegaEmbed(holder, specification, options)).view;
  // A tooltip is asked for before the pointer's new place is drawn; so it waits for that.
  const show = view.tooltip();
  view.tooltip(async (handler, event, item, value) => {
    await new Promise(requestAnimationFrame);
    await view.runAsync();
    show(handler, event, item, value && item.mark.items[0].tooltip);
  });
  await view.resize().runAsync(); // another handler: another drawing
}
new ResizeObserver(lodashDebounce(draw, 100, { leading: true })).observe(figure);
