// What the library says of itself, and the choice of an instruction set.
#include "testing.h"

namespace {

using namespace testing;

class Nothing : public Case {
public:
    uint64_t run(uint64_t) const override {
        CHECK(icseg_threads() >= 1);
        const std::string isa = icseg_isa();
        CHECK(isa == "portable" || isa == "avx2" || isa == "avx512");
        return 0;
    }
};

void errors() {
    CHECK(icseg_abi_version() == ICSEG_ABI_VERSION);
    CHECK(std::strlen(icseg_build()) > 0);
    const std::string widest = icseg_isa();
    EXPECT_CODE(ICSEG_OK, icseg_select_isa("portable"));
    for (const char* name : {"", "AVX2", "avx", "avx512f", "portable "}) {
        EXPECT_CODE(ICSEG_ISA_UNKNOWN, icseg_select_isa(name));
        CHECK(icseg_isa() == std::string("portable"));
    }
    EXPECT_CODE(ICSEG_OK, icseg_select_isa(nullptr));
    CHECK(icseg_isa() == widest);
    // Every code that the header names has a sentence of its own.
    const std::string unknown = icseg_error(-1);
    CHECK(unknown == icseg_error(1 << 20));
    std::vector<std::string> sentences;
    for (int code = 0; code < 256; ++code) {
        const std::string sentence = icseg_error(code);
        for (const std::string& other : sentences) CHECK(other != sentence);
        if (sentence != unknown) sentences.push_back(sentence);
    }
    CHECK(sentences.size() > ICSEG_ISA_MISSING);
}

const Test test("library", [](Random&, bool) -> std::unique_ptr<Case> { return std::make_unique<Nothing>(); }, errors);

}  // namespace
