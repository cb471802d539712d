const told = JSON.parse(document.getElementById("data").textContent);
drawCharts(document.getElementById("charts"), told.runs);
new Viewer(document.getElementById("viewer"), told.runs);
