// After each stroke the drawing becomes the component's value, as a PNG in a data URL.
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d');
let drawing = false;
function point(event) {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}
function clear() {
    pen.fillStyle = 'white';
    pen.fillRect(0, 0, canvas.width, canvas.height);
}
function submit() { props.value = canvas.toDataURL('image/png'); trigger('input'); }
canvas.addEventListener('pointerdown', event => {
    canvas.setPointerCapture(event.pointerId);
    drawing = true;
    Object.assign(pen, {lineWidth: 34, lineCap: 'round', lineJoin: 'round'});
    pen.beginPath();
    pen.moveTo(...point(event));
    pen.lineTo(...point(event));
    pen.stroke();
});
canvas.addEventListener('pointermove', event => {
    if (drawing) { pen.lineTo(...point(event)); pen.stroke(); }
});
for (const end of ['pointerup', 'pointercancel'])
    canvas.addEventListener(end, () => { if (drawing) { drawing = false; submit(); } });
element.querySelector('button').addEventListener('click', () => { clear(); submit(); });
watch('value', () => { if (!props.value) clear(); });  // set to empty when another run is chosen
clear();
