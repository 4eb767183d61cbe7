(() => {
  const make = (style, parent) => {
    const node = document.createElement("div");
    node.className = style;
    parent.append(node);
    return node;
  };
  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

  for (const figure of document.querySelectorAll("figure[data-hover]")) {
    const { heads, lines } = JSON.parse(figure.dataset.hover);
    const frame = figure.querySelector(".frame"), plot = figure.querySelector(".plot");
    let shown = null;
    const leave = () => {
      if (shown) shown.remove();
      shown = null;
    };
    frame.addEventListener("pointermove", (event) => {
      const area = plot.getBoundingClientRect(), around = frame.getBoundingClientRect();
      const x = (100 * (event.clientX - area.left)) / area.width;
      leave();
      if (x < -2 || x > 102) return;
      shown = make("hover", frame);
      const left = (percent) => area.left - around.left + (percent * area.width) / 100;
      const top = (percent) => area.top - around.top + (percent * area.height) / 100;
      const head = nearest(heads, x), rule = make("rule", shown), tip = make("tip", shown);
      rule.style.left = `${left(head[0])}px`;
      rule.style.top = `${top(0)}px`;
      rule.style.height = `${area.height}px`;
      make("head", tip).textContent = head[1];
      for (const { name, style, points } of lines) {
        const point = nearest(points, head[0]), dot = make(`dot ${style}`, shown), row = make(`key ${style}`, tip);
        dot.style.left = `${left(point[0])}px`;
        dot.style.top = `${top(point[1])}px`;
        const there = point[0] === head[0] ? "" : ` at ${nearest(heads, point[0])[1].split(" · ")[0]}`;
        const told = lines.length > 1 ? `${name} ${point[2]}${there}` : point[2];
        row.append(Object.assign(document.createElement("span"), { textContent: told }));
      }
      const place = left(head[0]), wide = tip.offsetWidth;
      const beside = place + 14 + wide > around.width ? place - 14 - wide : place + 14;
      tip.style.left = `${Math.max(0, Math.min(beside, around.width - wide))}px`;
      tip.style.top = `${top(0)}px`;
    });
    frame.addEventListener("pointerleave", leave);
  }

  const passage = document.querySelector(".passage"), told = document.querySelector(".told");
  if (passage && told) {
    const usual = told.textContent;
    passage.addEventListener("pointerover", (event) => {
      const figure = event.target.title;
      told.textContent = figure ? `${JSON.stringify(event.target.textContent)}: ${figure}` : usual;
    });
    passage.addEventListener("pointerleave", () => (told.textContent = usual));
  }
})();
