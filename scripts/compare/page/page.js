// Hands the charts' specification to Vega-Lite, and says how wide the page is.
const specification = JSON.parse(document.getElementById("specification").textContent);
const charts = document.getElementById("charts");
const holder = charts.appendChild(document.createElement("div"));
const { beside, names } = specification.usermeta;
let view, width;

async function draw() {
  if (charts.clientWidth === width) return;
  width = charts.clientWidth;
  charts.ariaBusy = "true";
  const columns = width > 700 && specification.concat.length > 1 ? 2 : 1;
  const room = (width - beside - (columns - 1) * specification.spacing.column) / columns;
  specification.columns = columns;
  specification.config.view.continuousWidth = room;
  specification.config.title.limit = room + beside;
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
    show(handler, event, item, value ? named(item.mark.items[0].tooltip) : value);
  });
  await view.resize().runAsync(); // another handler: another drawing
  charts.ariaBusy = "false";
}

// Runs by their names instead of their places; the space keeps a run called "title" from being one.
function named(tooltip) {
  const told = Object.entries(tooltip).filter(([, text]) => text);
  return Object.fromEntries(told.map(([key, text]) => [key in names ? `${names[key]} ` : key, text]));
}
new ResizeObserver(lodashDebounce(draw, 100, { leading: true })).observe(charts);
