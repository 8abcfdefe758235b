//! A plot of latency over time: points on a logarithmic axis, the phases of a move shaded behind them. Written here because
//! no crate that this workspace has draws, and what is drawn is always the same.

mod canvas;
mod font;
mod png;

use canvas::{Canvas, Colour, width};

/// What is drawn. Times are milliseconds from the freeze on, latencies microseconds.
pub struct Chart {
    pub title: String,
    pub under: String,
    /// From and to.
    pub span: (f64, f64),
    pub points: Vec<(f64, f64)>,
    /// Of other moves, behind the points.
    pub faint: Vec<(f64, f64)>,
    /// From when to when there was no reply.
    pub silence: (f64, f64),
    /// What the time went to: from, how long, what.
    pub bands: Vec<(f64, f64, String)>,
}

const SIZE: (usize, usize) = (1200, 680);
/// Of the axes in the picture.
const LEFT: usize = 110;
const RIGHT: usize = 1170;
const TOP: usize = 80;
const BOTTOM: usize = 540;

/// A way from values to pixels.
struct Axis {
    from: f64,
    to: f64,
    pixels: (usize, usize),
}

impl Axis {
    fn at(&self, value: f64) -> Option<usize> {
        let share = (value - self.from) / (self.to - self.from);
        let (from, to) = (self.pixels.0 as f64, self.pixels.1 as f64);
        (0.0..=1.0).contains(&share).then(|| (from + share * (to - from)).round() as usize)
    }

    /// As [`Axis::at`], of what lies outside the nearest end.
    fn near(&self, value: f64) -> usize {
        self.at(value.clamp(self.from, self.to)).unwrap_or(self.pixels.0)
    }
}

/// 1, 2 or 5 times a power of ten, such that there are some ten of them.
fn step(span: f64) -> f64 {
    let rough = span / 10.0;
    let power = 10f64.powf(rough.log10().floor());
    let times = [1.0, 2.0, 5.0, 10.0].into_iter().find(|times| times * power >= rough);
    times.unwrap_or(10.0) * power
}

/// Powers of ten around all latencies: at least two decades.
fn decades(points: &[(f64, f64)]) -> (f64, f64) {
    let logs = points.iter().map(|(_, us)| us.max(1.0).log10());
    let (least, most) = logs.fold((f64::INFINITY, 0f64), |(least, most), log| (least.min(log), most.max(log)));
    let from = if least.is_finite() { least.floor() } else { 1.0 };
    (from, most.ceil().max(from + 2.0))
}

fn latency(log: i32) -> String {
    match log {
        ..3 => format!("{} µs", 10f64.powi(log)),
        3..6 => format!("{} ms", 10f64.powi(log - 3)),
        _ => format!("{} s", 10f64.powi(log - 6)),
    }
}

fn grid(canvas: &mut Canvas, x: &Axis, y: &Axis) {
    let by = step(x.to - x.from);
    let mut at = (x.from / by).ceil() * by;
    while let Some(column) = x.at(at) {
        canvas.fill((column, TOP), (1, BOTTOM - TOP), Colour::Grid);
        let text = format!("{}", at.round());
        canvas.text((column - width(&text, 2) / 2, BOTTOM + 10), 2, &text);
        at += by;
    }
    for log in y.from as i32..=y.to as i32 {
        for nth in 1..10 {
            if let Some(row) = y.at(f64::from(log) + f64::from(nth).log10()) {
                let colour = if nth == 1 { Colour::Faint } else { Colour::Grid };
                canvas.fill((LEFT, row), (RIGHT - LEFT, 1), colour);
            }
        }
        let text = latency(log);
        canvas.text((LEFT - 10 - width(&text, 2), y.near(f64::from(log)) - 7), 2, &text);
    }
}

fn frame(canvas: &mut Canvas, chart: &Chart) {
    for (corner, size) in [
        ((LEFT, TOP), (RIGHT - LEFT, 1)),
        ((LEFT, BOTTOM), (RIGHT - LEFT, 1)),
        ((LEFT, TOP), (1, BOTTOM - TOP)),
        ((RIGHT, TOP), (1, BOTTOM - TOP + 1)),
    ] {
        canvas.fill(corner, size, Colour::Ink);
    }
    canvas.text((LEFT, 18), 3, &chart.title);
    canvas.text((LEFT, 52), 2, &chart.under);
    let below = "when a request was due, in ms from the freeze on";
    canvas.text(((LEFT + RIGHT - width(below, 2)) / 2, BOTTOM + 36), 2, below);
    let beside = "until its reply";
    canvas.text_upwards((4, (TOP + BOTTOM + width(beside, 2)) / 2), 2, beside);
}

/// A line over all of the silence, as high as a request waits that came at its begin.
fn silence(canvas: &mut Canvas, (from, to): (f64, f64), x: &Axis, y: &Axis) {
    let (left, right) = (x.near(from), x.near(to));
    let row = y.near(((to - from) * 1e3).max(1.0).log10());
    canvas.fill((left, row), (right - left + 1, 2), Colour::Ink);
    for end in [left, right] {
        canvas.fill((end, row - 6), (2, 14), Colour::Ink);
    }
    let text = format!("no reply for {:.1} ms", to - from);
    // Beside it, where there is the most room.
    canvas.text((right + 12, row - 7), 2, &text);
}

/// What the shades are, below the axis.
fn legend(canvas: &mut Canvas, bands: &[(f64, f64, String)]) {
    let (mut x, mut y) = (LEFT, BOTTOM + 72);
    for (which, (_, ms, what)) in bands.iter().enumerate() {
        let text = format!("{what} {ms:.2} ms");
        if x + 20 + width(&text, 2) > RIGHT {
            (x, y) = (LEFT, y + 26);
        }
        canvas.fill((x, y), (14, 14), Colour::Band(which as u8));
        canvas.text((x + 20, y), 2, &text);
        x += 20 + width(&text, 2) + 24;
    }
}

/// The picture, as PNG.
pub fn draw(chart: &Chart) -> Vec<u8> {
    let mut canvas = Canvas::new(SIZE.0, SIZE.1);
    let all: Vec<_> = chart.points.iter().chain(&chart.faint).copied().collect();
    let (least, most) = decades(&all);
    let x = Axis { from: chart.span.0, to: chart.span.1, pixels: (LEFT, RIGHT) };
    let y = Axis { from: least, to: most, pixels: (BOTTOM, TOP) };
    for (which, (from, ms, _)) in chart.bands.iter().enumerate() {
        let (left, right) = (x.near(*from), x.near(from + ms));
        canvas.fill((left, TOP), ((right - left).max(1), BOTTOM - TOP), Colour::Band(which as u8));
    }
    grid(&mut canvas, &x, &y);
    for (points, colour) in [(&chart.faint, Colour::Faint), (&chart.points, Colour::Point)] {
        for (ms, us) in points {
            if let (Some(column), Some(row)) = (x.at(*ms), y.at(us.max(1.0).log10())) {
                canvas.point(column, row, colour);
            }
        }
    }
    silence(&mut canvas, chart.silence, &x, &y);
    frame(&mut canvas, chart);
    legend(&mut canvas, &chart.bands);
    canvas.png()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_goes_from_end_to_end() {
        let y = Axis { from: 1.0, to: 5.0, pixels: (540, 80) };
        assert_eq!((y.at(1.0), y.at(3.0), y.at(5.0), y.at(5.1)), (Some(540), Some(310), Some(80), None));
        assert_eq!((y.near(0.0), y.near(9.0)), (540, 80));
    }

    #[test]
    fn lines_of_the_grid_are_round_numbers() {
        assert_eq!((step(1000.0), step(350.0), step(90.0)), (100.0, 50.0, 10.0));
    }

    #[test]
    fn decades_hold_all_that_is_seen() {
        assert_eq!(decades(&[(0.0, 30.0), (1.0, 120_000.0)]), (1.0, 6.0));
        assert_eq!(decades(&[]), (1.0, 3.0));
    }

    #[test]
    fn a_chart_is_a_png() {
        let chart = Chart {
            title: "redis".into(),
            under: String::new(),
            span: (-100.0, 300.0),
            points: (0..100).map(|i| (f64::from(i), 50.0 + f64::from(i))).collect(),
            faint: Vec::new(),
            silence: (-1.0, 82.0),
            bands: vec![(0.0, 80.0, "dump".into())],
        };
        let png = draw(&chart);
        assert!(png.starts_with(b"\x89PNG") && png.len() < 100_000, "{}", png.len());
    }
}
