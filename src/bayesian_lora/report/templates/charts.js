"use strict";
(async () => {
  const charts = [...document.querySelectorAll(".chart")];
  const root = document.documentElement;
  try {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const whole = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const library = document.createElement("script");
    library.textContent = await new Response(whole).text();
    document.head.append(library);
    const config = { displayModeBar: false, responsive: true, showTips: false };
    for (const chart of charts) {
      const figure = JSON.parse(chart.nextElementSibling.textContent);
      await Plotly.newPlot(chart, figure.data, figure.layout, config);
    }
    root.dataset.charts = "drawn";
  } catch (error) {
    for (const chart of charts) {
      if (chart.querySelector(".main-svg")) continue;
      chart.dataset.failed = "";
      chart.textContent = `Not drawn by this browser (${error.message}); its numbers are below.`;
    }
    root.dataset.charts = "failed";
  }
})();
