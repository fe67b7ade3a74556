//! Operations on an NVIDIA card, behind opaque buffers: what `kernels/` holds, launched from here. Compiled with the feature
//! `cuda`; the driver's library is looked for at run time, so one binary runs with and without a card.
//!
//! So far there is decode attention over spans of paged keys and values, the twin of [`super::attention`]; `weir bench kernels`
//! holds the two against each other. The engine does not run on a card yet.

use std::{ops::Range, sync::Arc};

use cudarc::{
    driver::{
        CudaContext, CudaModule, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
        ValidAsZeroBits, sys,
    },
    nvrtc::Ptx,
};
use half::f16;

use super::{
    attention::{Heads, POSITIONS},
    number::Number,
    span_table::SpanTable,
};

mod kernels {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// Sizes of heads, and greatest number of query heads per key head, that kernels are compiled for.
pub const HEAD_SIZES: [usize; 3] = [32, 64, 128];
pub const MOST_GROUPED: usize = 8;
/// Threads of a thread block of the decode kernel.
const THREADS: u32 = 128;
/// Most parts that one sequence is cut into.
const MOST_SPLITS: usize = 64;

/// Why a card does not do what it is asked to.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    #[error("{0}")]
    NotBuilt(&'static str),
    #[error("there is no NVIDIA driver here (libcuda is not found): run this on a machine with a card")]
    NoDriver,
    #[error("the card or its driver failed: {0}")]
    Driver(#[from] DriverError),
    #[error("{0}")]
    Shape(String),
}

/// A card with the kernels on it.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    processors: usize,
}

/// Memory of the card.
pub struct Buffer<T>(CudaSlice<T>);

impl<T> Buffer<T> {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Blocks of keys and values on the card, in the layout that `paged_attention.cu` describes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub heads: Heads,
    pub layers: usize,
}

impl Layout {
    /// Numbers of a block.
    pub fn block_elements(self) -> usize {
        self.heads.layer_elements() * self.layers
    }

    /// Writes one position's keys and values (`[head][element]` each) of a layer into a block, for copying to the card.
    pub fn store(self, block: &mut [f16], layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let Heads { keys: heads, size, .. } = self.heads;
        let within = position % POSITIONS;
        let layer = &mut block[layer * self.heads.layer_elements()..][..self.heads.layer_elements()];
        let (key_part, value_part) = layer.split_at_mut(heads * size * POSITIONS);
        for (at, key) in keys.iter().enumerate() {
            let (head, element) = (at / size, at % size);
            let row = head * size / 8 + element / 8;
            key_part[(row * POSITIONS + within) * 8 + element % 8] = f16::narrow(*key);
        }
        for (head, values) in values.chunks_exact(size).enumerate() {
            let out = &mut value_part[(head * POSITIONS + within) * size..][..size];
            out.iter_mut().zip(values).for_each(|(out, value)| *out = f16::narrow(*value));
        }
    }
}

/// A [`SpanTable`] on the card.
pub struct Spans {
    /// `[span]`: number of the block, first place, places, row of `turns` or -1.
    spans: Buffer<[i32; 4]>,
    /// `[sequences + 1]`.
    begins: Buffer<i32>,
    /// `[turn][half a head]`: cosines and sines.
    turns: Buffer<[f32; 2]>,
    size: usize,
    most: usize,
    blocks: usize,
}

impl Spans {
    pub fn sequences(&self) -> usize {
        self.begins.len() - 1
    }
}

/// One token of each sequence, and where the keys and values are that it sees.
pub struct Decode<'a> {
    pub layout: Layout,
    pub layer: usize,
    pub blocks: &'a Buffer<f16>,
    pub spans: &'a Spans,
}

impl Decode<'_> {
    /// Whether there is a kernel for these heads, and everything is within the buffers.
    fn check(&self, q: usize, out: usize) -> Result<(), CudaError> {
        let refuse = |reason| Err(CudaError::Shape(reason));
        let Heads { queries, keys, size } = self.layout.heads;
        let kernel = HEAD_SIZES.contains(&size) && keys > 0 && queries % keys == 0;
        if !kernel || !(1..=MOST_GROUPED).contains(&(queries / keys)) {
            return refuse(format!(
                "no kernel for {queries} query heads over {keys} key heads of {size} elements: heads of 32, 64 or 128 elements, \
                 at most {MOST_GROUPED} query heads per key head"
            ));
        }
        if self.layer >= self.layout.layers {
            return refuse(format!("there is no layer {} of {}", self.layer, self.layout.layers));
        }
        if self.spans.size != size {
            let packed = self.spans.size;
            return refuse(format!("spans were packed for heads of {packed} elements, and these have {size}"));
        }
        let blocks = self.blocks.len() / self.layout.block_elements();
        if self.spans.blocks > blocks {
            return refuse(format!("spans lie in block {}, and there are {blocks}", self.spans.blocks - 1));
        }
        let sequences = self.spans.sequences();
        let wanted = sequences * queries * size;
        if q != wanted || out != wanted {
            return refuse(format!(
                "queries of {sequences} sequences are {wanted} numbers, and so is what comes out: there are {q} and {out}"
            ));
        }
        Ok(())
    }
}

impl Device {
    /// The card of this number, with the kernels loaded.
    ///
    /// # Errors
    /// When weir was built without the kernels, or there is no such card.
    pub fn open(number: usize) -> Result<Self, CudaError> {
        let ptx = kernels::PAGED_ATTENTION.map_err(CudaError::NotBuilt)?;
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let context = CudaContext::new(number)?;
        let stream = context.new_stream()?;
        let module = context.load_module(Ptx::from_src(ptx))?;
        let processors = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self { context, stream, module, processors: processors.max(1) as usize })
    }

    /// What the card calls itself.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn name(&self) -> Result<String, CudaError> {
        Ok(self.context.name()?)
    }

    /// Memory with a copy of these numbers.
    ///
    /// # Errors
    /// [`CudaError::Driver`], when there is not so much.
    pub fn upload<T: DeviceRepr>(&self, numbers: &[T]) -> Result<Buffer<T>, CudaError> {
        Ok(Buffer(self.stream.clone_htod(numbers)?))
    }

    /// The table on the card.
    ///
    /// # Errors
    /// [`CudaError::Driver`], when there is not so much memory.
    pub fn upload_spans(&self, table: &SpanTable) -> Result<Spans, CudaError> {
        let SpanTable { spans, begins, turns, size, most, blocks } = table;
        // A driver does not give memory of no bytes.
        let turns = if turns.is_empty() { &[[1.0, 0.0]] } else { &turns[..] };
        Ok(Spans {
            spans: self.upload(spans)?,
            begins: self.upload(begins)?,
            turns: self.upload(turns)?,
            size: *size,
            most: *most,
            blocks: *blocks,
        })
    }

    /// Memory of so many zeros.
    ///
    /// # Errors
    /// [`CudaError::Driver`], when there is not so much.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, count: usize) -> Result<Buffer<T>, CudaError> {
        Ok(Buffer(self.stream.alloc_zeros(count)?))
    }

    /// What a buffer holds, once all that was launched before is done.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also of what was launched before.
    pub fn download<T: DeviceRepr>(&self, buffer: &Buffer<T>) -> Result<Vec<T>, CudaError> {
        let out = self.stream.clone_dtoh(&buffer.0)?;
        self.stream.synchronize()?;
        Ok(out)
    }

    /// Copies a buffer's beginning within the card's memory.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn copy<T: DeviceRepr>(
        &self,
        from: &Buffer<T>,
        to: &mut Buffer<T>,
        part: Range<usize>,
    ) -> Result<(), CudaError> {
        Ok(self.stream.memcpy_dtod(&from.0.slice(part.clone()), &mut to.0.slice_mut(part))?)
    }

    /// Seconds that what `launch` launches takes on the card.
    ///
    /// # Errors
    /// [`CudaError::Driver`], and what `launch` fails with.
    pub fn timed(&self, launch: impl FnOnce() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let event = || self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        let begin = event()?;
        launch()?;
        let end = event()?;
        end.synchronize()?;
        Ok(f64::from(begin.elapsed_ms(&end)?) / 1e3)
    }

    /// Parts that sequences are cut into, so that every processor has work.
    pub fn splits(&self, heads: Heads, spans: &Spans) -> usize {
        // Four thread blocks per processor; none for fewer than two spans per warp.
        let wanted = (4 * self.processors).div_ceil((spans.sequences() * heads.keys).max(1));
        wanted.min(spans.most.div_ceil(8)).clamp(1, MOST_SPLITS)
    }

    /// Attention of one token of each sequence: `q` and `out` are `[sequence][query head][size]`; `partial` is grown where it is
    /// too small. Returns once it is launched.
    ///
    /// # Errors
    /// [`CudaError::Shape`] for heads without a kernel, and for buffers and spans that do not fit; [`CudaError::Driver`].
    pub fn decode(
        &self,
        d: &Decode<'_>,
        q: &Buffer<f32>,
        partial: &mut Buffer<f32>,
        out: &mut Buffer<f32>,
    ) -> Result<(), CudaError> {
        d.check(q.len(), out.len())?;
        let Heads { queries, keys, size } = d.layout.heads;
        let group = queries / keys;
        let sequences = d.spans.sequences();
        let splits = self.splits(d.layout.heads, d.spans);
        let wanted = if splits == 1 { 0 } else { sequences * queries * splits * (size + 2) };
        if partial.len() < wanted {
            *partial = self.zeros(wanted)?;
        }
        let block = d.layout.block_elements() as i64;
        let layer = (d.layer * d.layout.heads.layer_elements()) as i64;
        let (heads, parts) = (keys as i32, splits as i32);
        let scale = 1.0 / (size as f32).sqrt();
        let function = self.module.load_function(&format!("paged_attention_decode_{size}_{group}"))?;
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&q.0).arg(&d.blocks.0).arg(&d.spans.spans.0).arg(&d.spans.begins.0).arg(&d.spans.turns.0);
        launch.arg(&block).arg(&layer).arg(&heads).arg(&parts).arg(&scale);
        launch.arg(&mut partial.0).arg(&mut out.0);
        let config = LaunchConfig {
            grid_dim: (keys as u32, sequences as u32, splits as u32),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the arguments are the kernel's, in its order. Sizes were checked above; spans when they were packed, and nobody
        // else writes them.
        unsafe { launch.launch(config) }?;
        if splits > 1 {
            let (size_of_head, parts) = (size as i32, splits as i32);
            let function = self.module.load_function("paged_attention_combine")?;
            let mut launch = self.stream.launch_builder(&function);
            launch.arg(&partial.0).arg(&size_of_head).arg(&parts).arg(&mut out.0);
            let config = LaunchConfig {
                grid_dim: ((sequences * queries) as u32, 1, 1),
                block_dim: (size as u32, 1, 1),
                shared_mem_bytes: 0,
            };
            // SAFETY: as above; `partial` is as long as the kernel before filled it.
            unsafe { launch.launch(config) }?;
        }
        Ok(())
    }
}
