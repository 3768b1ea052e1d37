//! The compiled kernels that are embedded in the binary.

/// Bytes where a 64-bit number may lie.
#[repr(C, align(16))]
#[allow(dead_code)] // there may be no images
struct Aligned<T>(T);

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Whether nvcc was there when this was built.
pub fn built() -> bool {
    !IMAGES.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::KERNELS;

    #[test]
    fn every_image_is_a_fat_binary() {
        // The magic number of `fatBinaryHeader`, as the CUDA toolkit's fatbinary_section.h has it.
        for (image, _) in IMAGES {
            assert!(image.as_ptr().addr().is_multiple_of(16));
            assert_eq!(image[..4], 0xba55_ed50_u32.to_le_bytes());
        }
        assert_eq!(built(), !IMAGES.is_empty());
    }

    #[test]
    fn every_kernel_is_in_one_image() {
        let images = |kernel| IMAGES.iter().filter(|(_, kernels)| kernels.contains(&kernel)).count();
        for (kernel, _) in KERNELS.iter().filter(|_| built()) {
            assert_eq!(images(kernel), 1, "{kernel}");
        }
    }
}
