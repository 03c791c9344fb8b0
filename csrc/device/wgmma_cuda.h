// wgmma.mma_async for every number of columns: one instruction each, which differ in its registers.
//
// PTX takes the sums one register at a time, so each width is spelled out: D<n> numbers the
// operands, R<n> names them, each from the narrower one. See device/hopper.h for what the words
// mean.
#pragma once

namespace weft::device {

template <int N>
struct WgmmaSums;

namespace detail {

// clang-format off
#define WEFT_R(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WEFT_D8 "%0, %1, %2, %3"
#define WEFT_R8 WEFT_R(0)
#define WEFT_D16 WEFT_D8 ", %4, %5, %6, %7"
#define WEFT_R16 WEFT_R8, WEFT_R(4)
#define WEFT_D24 WEFT_D16 ", %8, %9, %10, %11"
#define WEFT_R24 WEFT_R16, WEFT_R(8)
#define WEFT_D32 WEFT_D24 ", %12, %13, %14, %15"
#define WEFT_R32 WEFT_R24, WEFT_R(12)
#define WEFT_D40 WEFT_D32 ", %16, %17, %18, %19"
#define WEFT_R40 WEFT_R32, WEFT_R(16)
#define WEFT_D48 WEFT_D40 ", %20, %21, %22, %23"
#define WEFT_R48 WEFT_R40, WEFT_R(20)
#define WEFT_D56 WEFT_D48 ", %24, %25, %26, %27"
#define WEFT_R56 WEFT_R48, WEFT_R(24)
#define WEFT_D64 WEFT_D56 ", %28, %29, %30, %31"
#define WEFT_R64 WEFT_R56, WEFT_R(28)
#define WEFT_D72 WEFT_D64 ", %32, %33, %34, %35"
#define WEFT_R72 WEFT_R64, WEFT_R(32)
#define WEFT_D80 WEFT_D72 ", %36, %37, %38, %39"
#define WEFT_R80 WEFT_R72, WEFT_R(36)
#define WEFT_D88 WEFT_D80 ", %40, %41, %42, %43"
#define WEFT_R88 WEFT_R80, WEFT_R(40)
#define WEFT_D96 WEFT_D88 ", %44, %45, %46, %47"
#define WEFT_R96 WEFT_R88, WEFT_R(44)
#define WEFT_D104 WEFT_D96 ", %48, %49, %50, %51"
#define WEFT_R104 WEFT_R96, WEFT_R(48)
#define WEFT_D112 WEFT_D104 ", %52, %53, %54, %55"
#define WEFT_R112 WEFT_R104, WEFT_R(52)
#define WEFT_D120 WEFT_D112 ", %56, %57, %58, %59"
#define WEFT_R120 WEFT_R112, WEFT_R(56)
#define WEFT_D128 WEFT_D120 ", %60, %61, %62, %63"
#define WEFT_R128 WEFT_R120, WEFT_R(60)
#define WEFT_D136 WEFT_D128 ", %64, %65, %66, %67"
#define WEFT_R136 WEFT_R128, WEFT_R(64)
#define WEFT_D144 WEFT_D136 ", %68, %69, %70, %71"
#define WEFT_R144 WEFT_R136, WEFT_R(68)
#define WEFT_D152 WEFT_D144 ", %72, %73, %74, %75"
#define WEFT_R152 WEFT_R144, WEFT_R(72)
#define WEFT_D160 WEFT_D152 ", %76, %77, %78, %79"
#define WEFT_R160 WEFT_R152, WEFT_R(76)
#define WEFT_D168 WEFT_D160 ", %80, %81, %82, %83"
#define WEFT_R168 WEFT_R160, WEFT_R(80)
#define WEFT_D176 WEFT_D168 ", %84, %85, %86, %87"
#define WEFT_R176 WEFT_R168, WEFT_R(84)
#define WEFT_D184 WEFT_D176 ", %88, %89, %90, %91"
#define WEFT_R184 WEFT_R176, WEFT_R(88)
#define WEFT_D192 WEFT_D184 ", %92, %93, %94, %95"
#define WEFT_R192 WEFT_R184, WEFT_R(92)
#define WEFT_D200 WEFT_D192 ", %96, %97, %98, %99"
#define WEFT_R200 WEFT_R192, WEFT_R(96)
#define WEFT_D208 WEFT_D200 ", %100, %101, %102, %103"
#define WEFT_R208 WEFT_R200, WEFT_R(100)
#define WEFT_D216 WEFT_D208 ", %104, %105, %106, %107"
#define WEFT_R216 WEFT_R208, WEFT_R(104)
#define WEFT_D224 WEFT_D216 ", %108, %109, %110, %111"
#define WEFT_R224 WEFT_R216, WEFT_R(108)
#define WEFT_D232 WEFT_D224 ", %112, %113, %114, %115"
#define WEFT_R232 WEFT_R224, WEFT_R(112)
#define WEFT_D240 WEFT_D232 ", %116, %117, %118, %119"
#define WEFT_R240 WEFT_R232, WEFT_R(116)
#define WEFT_D248 WEFT_D240 ", %120, %121, %122, %123"
#define WEFT_R248 WEFT_R240, WEFT_R(120)
#define WEFT_D256 WEFT_D248 ", %124, %125, %126, %127"
#define WEFT_R256 WEFT_R248, WEFT_R(124)
// clang-format on

// a, b, one, b_columns, a_columns: the numbers of the operands that follow the sums.
#define WEFT_WGMMA(n, type, a, b, one, b_columns, a_columns)                                    \
  WEFT_SM90A_ASM("{\n.reg .pred add;\nsetp.ne.b32 add, " one                                    \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" WEFT_D##n \
                 "}, " a ", " b ", add, 1, 1, " a_columns ", " b_columns                        \
                 ";\n}" : WEFT_R##n : "l"(descriptor_a),                                        \
                 "l"(descriptor_b), "r"(1), "n"(int{kBColumns}), "n"(int{kAColumns}))

#define WEFT_WGMMA_OF(n, a, b, one, b_columns, a_columns)     \
  if constexpr (N == n) {                                     \
    if constexpr (kBf16)                                      \
      WEFT_WGMMA(n, "bf16", a, b, one, b_columns, a_columns); \
    else                                                      \
      WEFT_WGMMA(n, "f16", a, b, one, b_columns, a_columns);  \
  }

template <bool kBf16, bool kBColumns, bool kAColumns, int N>
WEFT_DEVICE void wgmma_of(WgmmaSums<N>& sums, uint64_t descriptor_a, uint64_t descriptor_b) {
  float (&d)[N / 2] = sums.value;
  WEFT_WGMMA_OF(8, "%4", "%5", "%6", "%7", "%8")
  WEFT_WGMMA_OF(16, "%8", "%9", "%10", "%11", "%12")
  WEFT_WGMMA_OF(24, "%12", "%13", "%14", "%15", "%16")
  WEFT_WGMMA_OF(32, "%16", "%17", "%18", "%19", "%20")
  WEFT_WGMMA_OF(40, "%20", "%21", "%22", "%23", "%24")
  WEFT_WGMMA_OF(48, "%24", "%25", "%26", "%27", "%28")
  WEFT_WGMMA_OF(56, "%28", "%29", "%30", "%31", "%32")
  WEFT_WGMMA_OF(64, "%32", "%33", "%34", "%35", "%36")
  WEFT_WGMMA_OF(72, "%36", "%37", "%38", "%39", "%40")
  WEFT_WGMMA_OF(80, "%40", "%41", "%42", "%43", "%44")
  WEFT_WGMMA_OF(88, "%44", "%45", "%46", "%47", "%48")
  WEFT_WGMMA_OF(96, "%48", "%49", "%50", "%51", "%52")
  WEFT_WGMMA_OF(104, "%52", "%53", "%54", "%55", "%56")
  WEFT_WGMMA_OF(112, "%56", "%57", "%58", "%59", "%60")
  WEFT_WGMMA_OF(120, "%60", "%61", "%62", "%63", "%64")
  WEFT_WGMMA_OF(128, "%64", "%65", "%66", "%67", "%68")
  WEFT_WGMMA_OF(136, "%68", "%69", "%70", "%71", "%72")
  WEFT_WGMMA_OF(144, "%72", "%73", "%74", "%75", "%76")
  WEFT_WGMMA_OF(152, "%76", "%77", "%78", "%79", "%80")
  WEFT_WGMMA_OF(160, "%80", "%81", "%82", "%83", "%84")
  WEFT_WGMMA_OF(168, "%84", "%85", "%86", "%87", "%88")
  WEFT_WGMMA_OF(176, "%88", "%89", "%90", "%91", "%92")
  WEFT_WGMMA_OF(184, "%92", "%93", "%94", "%95", "%96")
  WEFT_WGMMA_OF(192, "%96", "%97", "%98", "%99", "%100")
  WEFT_WGMMA_OF(200, "%100", "%101", "%102", "%103", "%104")
  WEFT_WGMMA_OF(208, "%104", "%105", "%106", "%107", "%108")
  WEFT_WGMMA_OF(216, "%108", "%109", "%110", "%111", "%112")
  WEFT_WGMMA_OF(224, "%112", "%113", "%114", "%115", "%116")
  WEFT_WGMMA_OF(232, "%116", "%117", "%118", "%119", "%120")
  WEFT_WGMMA_OF(240, "%120", "%121", "%122", "%123", "%124")
  WEFT_WGMMA_OF(248, "%124", "%125", "%126", "%127", "%128")
  WEFT_WGMMA_OF(256, "%128", "%129", "%130", "%131", "%132")
}

#undef WEFT_WGMMA_OF
#undef WEFT_WGMMA
#undef WEFT_R

}  // namespace detail
}  // namespace weft::device
