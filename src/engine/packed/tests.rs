use std::os::unix::fs::FileExt;

use super::*;
use crate::engine::{
    model::{Config, Llama},
    model_file::TensorType,
    testing::tiny,
};

fn load(path: &Path, dir: &Path) -> Llama {
    let file = ModelFile::open(path).unwrap();
    let config = Config::read(&file).unwrap();
    Llama::load_packed(&file, config, Format::Native, dir).unwrap()
}

fn packed(path: &Path, dir: &Path) -> Option<Packed> {
    Packed::open(dir, &ModelFile::open(path).unwrap(), Format::Native)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn what_is_mapped_is_what_was_packed() {
    let (source, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for kind in [TensorType::F32, TensorType::Q4_0, TensorType::Q8_0] {
        let path = tiny(kind, kind).write(source.path());
        let file = ModelFile::open(&path).unwrap();
        let plain = Llama::load(&file, Config::read(&file).unwrap(), Format::Native).unwrap();
        let first = load(&path, dir.path());
        assert!(packed(&path, dir.path()).is_some());
        let second = load(&path, dir.path());
        for model in [&first, &second] {
            assert_eq!(model.identity(), plain.identity(), "{kind:?}");
            assert_eq!(model.weight_bytes(), plain.weight_bytes());
        }
        let at = packed(&path, dir.path()).unwrap();
        let name = "blk.0.ffn_up.weight";
        let shape = at.header.matrices[name].shape;
        let info = &file.tensors[name];
        let (rows, columns) = (info.dimensions[1] as usize, info.dimensions[0] as usize);
        let mapped = at.matrix(name, rows, columns).unwrap();
        let raw = file.read(name).unwrap().unwrap();
        let own = Linear::pack(info.kind, &raw, rows, columns, Format::Native).unwrap();
        assert_eq!((mapped.shape(), mapped.as_bytes()), (shape, own.as_bytes()));
        assert!(at.matrix(name, rows + 1, columns).is_none() && at.matrix("other", rows, columns).is_none());
    }
    assert_eq!(files(dir.path()).len(), 1, "one file of one source, and nothing beside it");
}

#[test]
fn damage_another_source_and_no_room_are_noticed() {
    let (source, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = tiny(TensorType::Q4_0, TensorType::Q4_0).write(source.path());
    let whole = load(&path, dir.path());
    let at = files(dir.path()).remove(0);
    let length = std::fs::metadata(&at).unwrap().len();
    // A byte of the last matrix, one of the header, and half of the file.
    let last = packed(&path, dir.path()).unwrap();
    let end = last.header.matrices.values().map(|place| last.data + place.offset + place.bytes).max().unwrap();
    for damage in [end - 1, 40, 3] {
        let file = File::options().read(true).write(true).open(&at).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, damage).unwrap();
        file.write_all_at(&[byte[0] ^ 1], damage).unwrap();
        assert!(packed(&path, dir.path()).is_none(), "byte {damage} of {length}");
        assert_eq!(load(&path, dir.path()).identity(), whole.identity());
        assert!(packed(&path, dir.path()).is_some(), "made anew");
    }
    for left in [length / 2, 20, 4, 0] {
        File::options().write(true).open(&at).unwrap().set_len(left).unwrap();
        assert!(packed(&path, dir.path()).is_none(), "{left} of {length} bytes");
        load(&path, dir.path());
    }
    // The source changes in its place.
    tiny(TensorType::Q8_0, TensorType::Q8_0).write(source.path());
    assert!(packed(&path, dir.path()).is_none());
    assert_ne!(load(&path, dir.path()).identity(), whole.identity());
    // Where nothing can be written, the model is there all the same.
    let taken = source.path().join("taken");
    std::fs::write(&taken, b"no folder").unwrap();
    assert!(load(&path, &taken).weight_bytes() > 0);
}
