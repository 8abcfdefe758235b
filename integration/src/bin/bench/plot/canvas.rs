//! A picture with a palette, and what is drawn into it.

use super::{font, png};

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Colour {
    Paper,
    Ink,
    Grid,
    Faint,
    Point,
    /// One of [`BANDS`].
    Band(u8),
}

/// Shades behind the points.
pub const BANDS: [[u8; 3]; 7] = [
    [0xff, 0xe0, 0xb8],
    [0xf8, 0xc4, 0xc4],
    [0xd0, 0xe4, 0xf8],
    [0xcc, 0xec, 0xc8],
    [0xe4, 0xd4, 0xf4],
    [0xf0, 0xee, 0xb0],
    [0xc8, 0xec, 0xec],
];

const COLOURS: [[u8; 3]; 5] =
    [[0xff, 0xff, 0xff], [0x28, 0x2c, 0x34], [0xdc, 0xdf, 0xe4], [0xb4, 0xba, 0xc4], [0xc0, 0x28, 0x20]];

impl Colour {
    fn index(self) -> u8 {
        match self {
            Colour::Paper => 0,
            Colour::Ink => 1,
            Colour::Grid => 2,
            Colour::Faint => 3,
            Colour::Point => 4,
            Colour::Band(which) => COLOURS.len() as u8 + which % BANDS.len() as u8,
        }
    }
}

/// Width of a letter with what is between two, at scale 1.
const LETTER: usize = 6;

pub struct Canvas {
    pub width: usize,
    pub height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    pub fn new(width: usize, height: usize) -> Canvas {
        Canvas { width, height, pixels: vec![Colour::Paper.index(); width * height] }
    }

    pub fn dot(&mut self, x: usize, y: usize, colour: Colour) {
        if x < self.width && y < self.height {
            self.pixels[y * self.width + x] = colour.index();
        }
    }

    pub fn fill(&mut self, (x, y): (usize, usize), (width, height): (usize, usize), colour: Colour) {
        for row in y..y + height {
            (x..x + width).for_each(|column| self.dot(column, row, colour));
        }
    }

    /// A point that can be seen: three by three without its corners.
    pub fn point(&mut self, x: usize, y: usize, colour: Colour) {
        for (right, down) in [(1, 0), (0, 1), (1, 1), (2, 1), (1, 2)] {
            self.dot((x + right).saturating_sub(1), (y + down).saturating_sub(1), colour);
        }
    }

    pub fn text(&mut self, (x, y): (usize, usize), scale: usize, text: &str) {
        for (at, letter) in text.chars().enumerate() {
            for (column, bits) in font::columns(letter).into_iter().enumerate() {
                for row in (0..8).filter(|row| bits >> row & 1 == 1) {
                    let corner = (x + (at * LETTER + column) * scale, y + row * scale);
                    self.fill(corner, (scale, scale), Colour::Ink);
                }
            }
        }
    }

    /// From the bottom to the top.
    pub fn text_upwards(&mut self, (x, y): (usize, usize), scale: usize, text: &str) {
        for (at, letter) in text.chars().enumerate() {
            for (column, bits) in font::columns(letter).into_iter().enumerate() {
                for row in (0..8).filter(|row| bits >> row & 1 == 1) {
                    let up = (at * LETTER + column + 1) * scale;
                    self.fill((x + row * scale, y.saturating_sub(up)), (scale, scale), Colour::Ink);
                }
            }
        }
    }

    pub fn png(&self) -> Vec<u8> {
        png::encode(self.width, self.height, &[&COLOURS[..], &BANDS].concat(), &self.pixels)
    }
}

/// Pixels that a text takes.
pub fn width(text: &str, scale: usize) -> usize {
    text.chars().count() * LETTER * scale
}
