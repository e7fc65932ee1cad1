# The sources of jax_flash_cpu. kernels.cc is compiled once per instruction set, each into its own namespace.
target_sources(jax_flash_cpu PRIVATE csrc/cpu/attention.cc csrc/cpu/parallel.cc csrc/ffi/cpu_handlers.cc)

set(JF_ISA_baseline "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(JF_ISAS baseline avx2 avx512 avx512_bf16)
  set(JF_ISA_baseline -march=x86-64-v2)
  set(JF_ISA_avx2 -march=x86-64-v3)
  set(JF_ISA_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
  set(JF_ISA_avx512_bf16 ${JF_ISA_avx512} -mavx512bf16)
else()
  set(JF_ISAS baseline)
endif()
if(JAX_FLASH_CPU_ISAS)
  set(JF_ISAS ${JAX_FLASH_CPU_ISAS})
endif()
foreach(isa IN LISTS JF_ISAS)
  add_library(jax_flash_cpu_${isa} OBJECT csrc/cpu/kernels.cc)
  target_link_libraries(jax_flash_cpu_${isa} PRIVATE jax_flash_options)
  target_compile_definitions(jax_flash_cpu_${isa} PRIVATE JF_ISA=${isa})
  # -O3 in every build type, because the vector functions of isa.h are fast only when inlined. The AVX-512 headers of
  # GCC 12 warn about uninitialised vectors.
  target_compile_options(jax_flash_cpu_${isa} PRIVATE ${JF_ISA_${isa}} -O3 -ffp-contract=fast -fno-math-errno
    -fno-trapping-math -fno-signed-zeros -fno-exceptions -Wno-psabi
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  target_sources(jax_flash_cpu PRIVATE $<TARGET_OBJECTS:jax_flash_cpu_${isa}>)
  string(TOUPPER ${isa} ISA)
  target_compile_definitions(jax_flash_cpu PRIVATE JF_HAS_${ISA})
endforeach()
