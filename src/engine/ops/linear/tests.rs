use super::*;
use crate::engine::{
    ops::{Level, Pool},
    testing::{numbers, quantise_q4_0, quantise_q4_1, quantise_q8_0},
};

fn raw_of(kind: TensorType, values: &[f32]) -> Vec<u8> {
    match kind {
        TensorType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        TensorType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        TensorType::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        TensorType::Q4_0 => quantise_q4_0(values),
        TensorType::Q4_1 => quantise_q4_1(values),
        TensorType::Q8_0 => quantise_q8_0(values),
        kind => any_bytes(kind, values.len()),
    }
}

/// Any bytes are a tensor of these kinds, if only their f16 are of a sensible size.
fn any_bytes(kind: TensorType, elements: usize) -> Vec<u8> {
    let (per_block, bytes) = kind.block();
    let places: &[(usize, f32)] = match kind {
        TensorType::Q5_0 => &[(0, 1.0 / 16.0)],
        TensorType::Q5_1 => &[(0, 1.0 / 32.0), (2, -0.5)],
        TensorType::Q2K => &[(80, 1.0 / 50.0), (82, 1.0 / 15.0)],
        TensorType::Q3K => &[(108, 1.0 / 120.0)],
        TensorType::Q4K => &[(0, 1.0 / 900.0), (2, 1.0 / 60.0)],
        TensorType::Q5K => &[(0, 1.0 / 1900.0), (2, 1.0 / 60.0)],
        TensorType::Q6K => &[(208, 1.0 / 4000.0)],
        other => panic!("no writer for {other:?}"),
    };
    let blocks = elements / per_block as usize;
    let byte = |v: &f32| ((v + 1.0) * (1u32 << 23) as f32) as u32 as u8;
    let mut raw: Vec<u8> = numbers(blocks * bytes as usize, 77).iter().map(byte).collect();
    for (n, block) in raw.chunks_exact_mut(bytes as usize).enumerate() {
        for (at, size) in places {
            // Both signs, and not all alike.
            let size = size * (1.0 + n as f32 % 7.0 / 7.0) * if n % 5 == 4 { -1.0 } else { 1.0 };
            block[*at..at + 2].copy_from_slice(&f16::from_f32(size).to_le_bytes());
        }
    }
    raw
}

fn product(level: Level, precision: Precision, w: &Linear, x: &[f32], tokens: usize) -> Vec<f32> {
    let ops = Ops { level, pool: Pool::new(2).unwrap() };
    let mut out = vec![0.0; tokens * w.rows()];
    multiply(&ops, x, tokens, precision, &mut Quantised::default(), &mut [(w, &mut out)]);
    out
}

const KINDS: [TensorType; 13] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::Bf16,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q8_0,
    TensorType::Q2K,
    TensorType::Q3K,
    TensorType::Q4K,
    TensorType::Q5K,
    TensorType::Q6K,
];

/// A number of columns that the kind can have: `few`, or two blocks of 256.
fn columns_of(kind: TensorType, few: usize) -> usize {
    if kind.block().0 == 256 { 512 } else { few }
}

#[test]
fn rows_come_back_as_the_file_has_them() {
    for kind in KINDS {
        let (rows, columns) = (37, columns_of(kind, 96));
        let values = numbers(rows * columns, 5);
        let raw = raw_of(kind, &values);
        let want = dequantise(kind, &raw, rows * columns).unwrap();
        for format in [Format::Native, Format::F32] {
            let w = Linear::pack(kind, &raw, rows, columns, format).unwrap();
            let mut row = vec![0.0; columns];
            for r in 0..rows {
                w.row(r, &mut row);
                for (got, want) in row.iter().zip(&want[r * columns..]) {
                    // Of formats with minima the two parts may nearly cancel out.
                    let most = 1e-6 * want.abs().max(0.05);
                    assert!((got - want).abs() <= most, "{kind:?} {format:?} row {r}: {got}, {want}");
                }
            }
        }
    }
}

#[test]
fn products_agree_with_f64_within_the_activations_precision() {
    for kind in KINDS {
        let (rows, columns, tokens) = (50, columns_of(kind, 160), 11);
        let values = numbers(rows * columns, 6);
        let x = numbers(tokens * columns, 7);
        let raw = raw_of(kind, &values);
        let exact = dequantise(kind, &raw, rows * columns).unwrap();
        for format in [Format::Native, Format::F32] {
            let w = Linear::pack(kind, &raw, rows, columns, format).unwrap();
            for (precision, tolerance) in [(Precision::Sixteen, 3e-5), (Precision::Eight, 4e-3)] {
                let got = product(Level::detect(), precision, &w, &x, tokens);
                for t in 0..tokens {
                    for r in 0..rows {
                        let terms =
                            (0..columns).map(|c| f64::from(exact[r * columns + c]) * f64::from(x[t * columns + c]));
                        let (want, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                        let got = f64::from(got[t * rows + r]);
                        assert!(
                            (got - want).abs() <= size * tolerance,
                            "{kind:?} {format:?} {precision:?}: {got}, {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn every_level_and_batch_gives_the_scalar_twins_bits() {
    for (kind, precision) in KINDS.into_iter().flat_map(|kind| [(kind, Precision::Eight), (kind, Precision::Sixteen)]) {
        let (rows, columns, tokens) = (40, columns_of(kind, 96), 75);
        let values = numbers(rows * columns, 8);
        let x = numbers(tokens * columns, 9);
        let w = Linear::pack(kind, &raw_of(kind, &values), rows, columns, Format::Native).unwrap();
        let product = |level, w: &Linear, x: &[f32], tokens| product(level, precision, w, x, tokens);
        let want = product(Level::Scalar, &w, &x, tokens);
        for level in Level::available() {
            assert_eq!(product(level, &w, &x, tokens), want, "{kind:?} {level:?}");
            for t in [0, 7, 74] {
                let alone = product(level, &w, &x[t * columns..][..columns], 1);
                assert_eq!(alone, want[t * rows..][..rows], "{kind:?} {level:?} token {t} alone");
            }
        }
    }
}

#[test]
fn extreme_weights_and_activations_do_not_overflow() {
    // Greatest magnitudes of all: what would saturate 16-bit sums.
    let columns = 64;
    for sign in [1.0, -1.0] {
        let values: Vec<f32> = (0..16 * columns).map(|i| if i % 64 == 0 { 1.0 } else { sign }).collect();
        let x = vec![sign; columns];
        for kind in [TensorType::Q4_0, TensorType::Q4_1, TensorType::Q8_0] {
            let raw = raw_of(kind, &values);
            let exact = dequantise(kind, &raw, values.len()).unwrap();
            let w = Linear::pack(kind, &raw, 16, columns, Format::Native).unwrap();
            for (level, precision) in
                Level::available().into_iter().flat_map(|l| [(l, Precision::Eight), (l, Precision::Sixteen)])
            {
                let got = product(level, precision, &w, &x, 1);
                let want: f32 = exact[..columns].iter().map(|w| w * sign).sum();
                assert!((got[3] - want).abs() < 0.5, "{kind:?} {level:?}: {} against {want}", got[3]);
            }
        }
    }
}

#[test]
fn what_a_file_packs_stays_packed() {
    for (kind, bits) in [
        (TensorType::F16, 16.0),
        (TensorType::Bf16, 16.0),
        (TensorType::Q4_0, 5.0),
        (TensorType::Q4K, 4.7),
        (TensorType::Q5K, 8.7),
        (TensorType::Q6K, 8.7),
        (TensorType::Q3K, 8.7),
        (TensorType::Q5_0, 8.5),
        (TensorType::Q8_0, 8.5),
    ] {
        let w = Linear::pack(kind, &raw_of(kind, &numbers(32 * 1024, 1)), 32, 1024, Format::Native).unwrap();
        let seen = w.bytes() as f64 * 8.0 / f64::from(32 * 1024);
        assert!(seen <= bits + 0.05, "{kind:?} takes {seen} bits a weight");
    }
}

#[test]
fn several_matrices_share_one_product() {
    let (columns, tokens) = (64, 3);
    let x = numbers(tokens * columns, 10);
    let a = Linear::pack(
        TensorType::Q8_0,
        &raw_of(TensorType::Q8_0, &numbers(20 * columns, 1)),
        20,
        columns,
        Format::Native,
    );
    let b =
        Linear::pack(TensorType::F32, &raw_of(TensorType::F32, &numbers(33 * columns, 2)), 33, columns, Format::Native);
    let (a, b) = (a.unwrap(), b.unwrap());
    let (mut out_a, mut out_b) = (vec![0.0; 60], vec![0.0; 99]);
    let ops = Ops { level: Level::detect(), pool: Pool::new(1).unwrap() };
    multiply(
        &ops,
        &x,
        tokens,
        Precision::Sixteen,
        &mut Quantised::default(),
        &mut [(&a, &mut out_a), (&b, &mut out_b)],
    );
    assert_eq!(out_a, product(Level::detect(), Precision::Sixteen, &a, &x, tokens));
    assert_eq!(out_b, product(Level::detect(), Precision::Sixteen, &b, &x, tokens));
}
