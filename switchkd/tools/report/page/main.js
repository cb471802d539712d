const data = JSON.parse(document.getElementById("data").textContent);
drawCharts(document.getElementById("charts"), data.runs);
new Viewer(document.getElementById("viewer"), data.runs);
