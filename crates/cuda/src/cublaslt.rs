//! Products of many rows through cuBLASLt, loaded at run time.
//!
//! cuBLASLt thinks in columns: our row-major `out = x * w^T` is its column-major `out^T = w * x^T`, where `w` lies transposed
//! as it is and `x^T` is `x`.

use crate::gpu::Gpu;
use crate::queue::{Product, ProductShape};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use rudder_ops::{OpError, Result};
use std::collections::HashMap;

/// NVIDIA advises 32 MiB of workspace for Hopper and Blackwell.
const WORKSPACE: usize = 32 << 20;
/// `CUBLAS_OP_T` of cublas_api.h.
const TRANSPOSED: i32 = 1;
/// Shapes whose plans are kept; prompts come in any number of rows.
const MOST_PLANS: usize = 4096;

/// A handle to the library, and how it multiplies each shape seen so far. Like a GPU's context, it lives until the process ends.
pub(crate) struct CublasLt {
    handle: sys::cublasLtHandle_t,
    /// Address of [`WORKSPACE`] bytes, which live as long as the process.
    workspace: u64,
    /// `None` where the library knows no way.
    plans: HashMap<ProductShape, Option<Plan>>,
}

// SAFETY: the handle may be used from any thread, by one at a time, which `&mut self` sees to.
unsafe impl Send for CublasLt {}

/// How one shape is multiplied.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(e: CublasError) -> OpError {
    OpError::Backend(format!("cuBLASLt: {e}"))
}

impl CublasLt {
    /// # Errors
    /// If the library cannot be loaded, or there is no memory for its workspace.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        // SAFETY: loads libcublasLt, whose initialisers are NVIDIA's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpError::Backend(
                "libcublasLt cannot be loaded (LD_LIBRARY_PATH may name it)".into(),
            ));
        }
        gpu.bind()?;
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self { handle, workspace: gpu.allocate(WORKSPACE)?, plans: HashMap::new() })
    }

    /// Whether the library knows a way to do products of this shape.
    pub fn can(&mut self, shape: ProductShape) -> bool {
        if self.plans.len() >= MOST_PLANS && !self.plans.contains_key(&shape) {
            self.plans.clear();
        }
        let handle = self.handle;
        self.plans.entry(shape).or_insert_with(|| Plan::find(handle, shape)).is_some()
    }

    /// `out = x * w^T`, for a shape that [`CublasLt::can`] do.
    pub fn multiply(&mut self, gpu: &Gpu, product: &Product) -> Result<()> {
        gpu.bind()?;
        if !self.can(product.shape) {
            return Err(OpError::Backend(format!("cuBLASLt does not multiply {:?}", product.shape)));
        }
        let Some(Some(plan)) = self.plans.get(&product.shape) else { unreachable!("found just now") };
        let (one, zero) = (1f32, 0f32);
        let pointer = |address: u64| address as *mut std::ffi::c_void;
        // SAFETY: layouts and buffers are of the same shapes (`linear` checked them); scale factors are read at once.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                pointer(product.w),
                plan.w,
                pointer(product.x),
                plan.x,
                pointer(product.out),
                plan.out,
                pointer(product.out),
                plan.out,
                &raw const plan.algorithm,
                pointer(self.workspace),
                WORKSPACE,
                gpu.stream().cast(),
            )
        }
        .map_err(failed)
    }
}

impl Plan {
    fn find(handle: sys::cublasLtHandle_t, shape: ProductShape) -> Option<Self> {
        Self::try_find(handle, shape)
            .inspect_err(|e| {
                tracing::warn!("cuBLASLt does not multiply {shape:?} ({e}); a plain kernel does")
            })
            .ok()
    }

    fn try_find(
        handle: sys::cublasLtHandle_t,
        ProductShape { rows, n, k, stride }: ProductShape,
    ) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let (bf16, f32) = (sys::cudaDataType_t::CUDA_R_16BF, sys::cudaDataType_t::CUDA_R_32F);
        let product = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?;
        let (transposed, workspace) = (TRANSPOSED, WORKSPACE);
        // SAFETY: the attribute is a 32-bit number, read before the call returns.
        unsafe {
            result::set_matmul_desc_attribute(
                product,
                CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )?;
        }
        let w = result::create_matrix_layout(bf16, k as u64, n as u64, k as i64)?;
        let x = result::create_matrix_layout(bf16, k as u64, rows as u64, k as i64)?;
        let out = result::create_matrix_layout(f32, n as u64, rows as u64, stride as i64)?;
        let preference = result::create_matmul_pref()?;
        // SAFETY: the attribute is a size, read before the call returns; all descriptions were just made.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )?;
            let found = result::get_matmul_algo_heuristic(handle, product, w, x, out, out, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Self { product, w, x, out, algorithm: found.algo })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: freed once; queued products no longer need their descriptions. Nothing could be done about an error.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
