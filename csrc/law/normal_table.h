// The constants of the normal law: a cubic for each half octave of the tail count f (see normal.h).
//
// Row r serves f in [2^e, 1.5 * 2^e) if r = 2e and [1.5 * 2^e, 2^(e+1)) if r = 2e + 1; terms c0,
// c1, c2, c3 of P(f), the lowest power first. Rows carry the 2^-31 of v and the power of two that
// scales f to its octave. Row 61 is a quadratic because its cubic term would be a denormal; of row
// 62 only f = 2^31 is reached (the conversion can round up to it), of row 63 nothing.
#pragma once

namespace trak_ext {

constexpr int kNormalRows = 64;
constexpr int kNormalTerms = 4;

// clang-format off
#define TRAK_EXT_NORMAL_TABLE \
    {0x1.9eed5ep-29f, -0x1.81a30cp-33f, 0x1.33da9cp-34f, -0x1.b59146p-37f}, \
    {0x1.9b928ep-29f, -0x1.1365ep-33f, 0x1.38769p-35f, -0x1.3cb2b8p-38f}, \
    {0x1.98308ap-29f, -0x1.880232p-34f, 0x1.38cf58p-36f, -0x1.bc8dccp-40f}, \
    {0x1.94c81ep-29f, -0x1.1805fep-34f, 0x1.3d9326p-37f, -0x1.41d628p-41f}, \
    {0x1.915824p-29f, -0x1.8eb3a2p-35f, 0x1.3e0246p-38f, -0x1.c3e138p-43f}, \
    {0x1.8de172p-29f, -0x1.1ce2dcp-35f, 0x1.42f0f2p-39f, -0x1.473a9p-44f}, \
    {0x1.8a62d4p-29f, -0x1.95be7ap-36f, 0x1.4378ap-40f, -0x1.cb92dp-46f}, \
    {0x1.86dd28p-29f, -0x1.2201d4p-36f, 0x1.48958cp-41f, -0x1.4ce582p-47f}, \
    {0x1.834f26p-29f, -0x1.9d2ac6p-37f, 0x1.493852p-42f, -0x1.d3aad4p-49f}, \
    {0x1.7fb9bap-29f, -0x1.2768e6p-37f, 0x1.4e8726p-43f, -0x1.52dd18p-50f}, \
    {0x1.7c1b86p-29f, -0x1.a50136p-38f, 0x1.4f4768p-44f, -0x1.dc3144p-52f}, \
    {0x1.787582p-29f, -0x1.2d1e86p-38f, 0x1.54cc06p-45f, -0x1.59272p-53f}, \
    {0x1.74c636p-29f, -0x1.ad4b26p-39f, 0x1.55abeap-46f, -0x1.e52d7ap-55f}, \
    {0x1.710eb6p-29f, -0x1.332aa8p-39f, 0x1.5b6cbp-47f, -0x1.5fcc6p-56f}, \
    {0x1.6d4d4ap-29f, -0x1.b61266p-40f, 0x1.5c6b52p-48f, -0x1.eea4e4p-58f}, \
    {0x1.69834ep-29f, -0x1.39942ap-40f, 0x1.626dcep-49f, -0x1.66cf44p-59f}, \
    {0x1.65ae9cp-29f, -0x1.bf6034p-41f, 0x1.638896p-50f, -0x1.f89688p-61f}, \
    {0x1.61d0ccp-29f, -0x1.405b8p-41f, 0x1.69c35ep-51f, -0x1.6e17bcp-62f}, \
    {0x1.5de88cp-29f, -0x1.c95c66p-42f, 0x1.6b3652p-52f, -0x1.01b304p-63f}, \
    {0x1.59f794p-29f, -0x1.47d882p-42f, 0x1.722866p-53f, -0x1.76bc4ep-65f}, \
    {0x1.55fa9ep-29f, -0x1.d468e6p-43f, 0x1.74054ep-54f, -0x1.0821b8p-66f}, \
    {0x1.51f1c4p-29f, -0x1.4fc1f2p-43f, 0x1.7aeb9p-55f, -0x1.7fb3dep-68f}, \
    {0x1.4dd84ep-29f, -0x1.df20b8p-44f, 0x1.7babccp-56f, -0x1.0d2c6p-69f}, \
    {0x1.49b622p-29f, -0x1.576fd2p-44f, 0x1.82655ap-57f, -0x1.86581p-71f}, \
    {0x1.458ce8p-29f, -0x1.ebb444p-45f, 0x1.8572ccp-58f, -0x1.141f66p-72f}, \
    {0x1.41604cp-29f, -0x1.62550cp-45f, 0x1.907f26p-59f, -0x1.96c83cp-74f}, \
    {0x1.3d012p-29f, -0x1.f76ca8p-46f, 0x1.8d39ecp-60f, -0x1.18edd2p-75f}, \
    {0x1.38aa3ap-29f, -0x1.694922p-46f, 0x1.9490eep-61f, -0x1.9775d8p-77f}, \
    {0x1.34667ap-29f, -0x1.052462p-46f, 0x1.9f5318p-62f, -0x1.282ef8p-78f}, \
    {0x1.2fdd9ap-29f, -0x1.74d76ap-47f, 0x1.a22994p-63f, -0x1.a63168p-80f}, \
    {0x1.2b6ebap-29f, -0x1.0ca10ep-47f, 0x1.aa05e2p-64f, -0x1.2f33e6p-81f}, \
    {0x1.26cc08p-29f, -0x1.80980ap-48f, 0x1.af0846p-65f, -0x1.b35276p-83f}, \
    {0x1.223fe4p-29f, -0x1.1592b8p-48f, 0x1.b83c06p-66f, -0x1.39a6eap-84f}, \
    {0x1.1d75e2p-29f, -0x1.8d4e1cp-49f, 0x1.bcccfap-67f, -0x1.c14d32p-86f}, \
    {0x1.186dcep-29f, -0x1.185b9cp-49f, 0x1.b18f62p-68f, -0x1.2dd898p-87f}, \
    {0x1.13cf6p-29f, -0x1.9a9d8ep-50f, 0x1.cab8c6p-69f, -0x1.cf5ea2p-89f}, \
    {0x1.0ec42ap-29f, -0x1.24acccp-50f, 0x1.c70288p-70f, -0x1.3e86fep-90f}, \
    {0x1.09dcbcp-29f, -0x1.a9a07p-51f, 0x1.da7b12p-71f, -0x1.defc76p-92f}, \
    {0x1.04df46p-29f, -0x1.342d34p-51f, 0x1.e5a9bcp-72f, -0x1.594048p-93f}, \
    {0x1.ff14f8p-30f, -0x1.b9349ep-52f, 0x1.e91bc6p-73f, -0x1.eb4374p-95f}, \
    {0x1.f46698p-30f, -0x1.3cbffep-52f, 0x1.ebe8fap-74f, -0x1.59360cp-96f}, \
    {0x1.e9d00ap-30f, -0x1.cc9a54p-53f, 0x1.fed1c2p-75f, -0x1.00fcccp-97f}, \
    {0x1.df349ap-30f, -0x1.4fe4bp-53f, 0x1.0916f6p-75f, -0x1.7ab356p-99f}, \
    {0x1.d3e834p-30f, -0x1.e47ee8p-54f, 0x1.0e032ep-76f, -0x1.10f6cep-100f}, \
    {0x1.c7c302p-30f, -0x1.56eacp-54f, 0x1.072f98p-77f, -0x1.6d5ecap-102f}, \
    {0x1.bc9814p-30f, -0x1.f87608p-55f, 0x1.17c7dap-78f, -0x1.19da48p-103f}, \
    {0x1.b0a45ap-30f, -0x1.6c11f8p-55f, 0x1.1b324p-79f, -0x1.8dc544p-105f}, \
    {0x1.a4044ap-30f, -0x1.055e8ap-55f, 0x1.1e797cp-80f, -0x1.1c807p-106f}, \
    {0x1.977d5ap-30f, -0x1.79ae58p-56f, 0x1.236fdap-81f, -0x1.955e0ap-108f}, \
    {0x1.8b261cp-30f, -0x1.15396p-56f, 0x1.350f74p-82f, -0x1.371aa8p-109f}, \
    {0x1.7e2b5p-30f, -0x1.91ada6p-57f, 0x1.3cdb54p-83f, -0x1.bfe56p-111f}, \
    {0x1.70a0c6p-30f, -0x1.224c4cp-57f, 0x1.46dd8cp-84f, -0x1.49b79cp-112f}, \
    {0x1.626272p-30f, -0x1.9daef4p-58f, 0x1.45ea0ep-85f, -0x1.c765dap-114f}, \
    {0x1.54261ap-30f, -0x1.29d798p-58f, 0x1.5051aep-86f, -0x1.4fb8e6p-115f}, \
    {0x1.45d6cep-30f, -0x1.acaeap-59f, 0x1.5a5b1p-87f, -0x1.e8fb3cp-117f}, \
    {0x1.36f4b4p-30f, -0x1.3275c6p-59f, 0x1.64c0fep-88f, -0x1.67e9d8p-118f}, \
    {0x1.278bb6p-30f, -0x1.b0573p-60f, 0x1.673496p-89f, -0x1.fc603p-120f}, \
    {0x1.17fc64p-30f, -0x1.30a172p-60f, 0x1.6f9bf8p-90f, -0x1.73f354p-121f}, \
    {0x1.07f098p-30f, -0x1.a51456p-61f, 0x1.6dbe66p-91f, -0x1.0205dep-122f}, \
    {0x1.eff76ep-31f, -0x1.2219c2p-61f, 0x1.73d2b2p-92f, -0x1.73846ep-124f}, \
    {0x1.cfd56p-31f, -0x1.86578cp-62f, 0x1.70424p-93f, -0x1.ec7412p-126f}, \
    {0x1.9b256ap-31f, -0x1.6b9fecp-63f, 0x1.6e3386p-95f, 0.0f}, \
    {0x1.40d932p-31f, 0.0f, 0.0f, 0.0f}, \
    {0x1.40d932p-31f, 0.0f, 0.0f, 0.0f},
// clang-format on

constexpr float kNormalTable[kNormalRows][kNormalTerms] = {TRAK_EXT_NORMAL_TABLE};

}  // namespace trak_ext
