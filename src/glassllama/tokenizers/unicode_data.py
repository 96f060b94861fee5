"""Made by docs/make_unicode_data.py: general categories of every code point."""

VERSION = "16.0"
CATEGORIES = (
    "Cn Cc Cf Co Ll Lm Lo Lt Lu Mc Me Mn Nd Nl No Pc Pd Pe Pf Pi Po Ps Sc Sk Sm So Zl Zp Zs"
).split()
MORE_WORD_RANGES = (
    (8204, 8205), (9398, 9449), (127280, 127305), (127312, 127337), (127344, 127369),
)  # fmt: skip
# Where tokenizers' Punctuation, which has older tables, is not category P.
OTHER_PUNCTUATION_RANGES = (
    (36, 36), (43, 43), (60, 62), (94, 94), (96, 96),
    (124, 124), (126, 126), (1565, 1565), (2557, 2557), (2678, 2678),
    (3191, 3191), (3204, 3204), (5741, 5741), (6990, 6991), (7037, 7039),
    (11843, 11855), (11858, 11869), (68974, 68974), (69293, 69293), (69461, 69465),
    (69510, 69513), (70089, 70089), (70612, 70613), (70615, 70616), (70731, 70735),
    (70746, 70747), (70749, 70749), (71264, 71276), (71353, 71353), (71739, 71739),
    (72004, 72006), (72162, 72162), (72255, 72262), (72346, 72348), (72350, 72354),
    (72448, 72457), (72673, 72673), (72769, 72773), (72816, 72817), (73463, 73464),
    (73539, 73551), (73727, 73727), (77809, 77810), (93549, 93551), (93847, 93850),
    (94178, 94178), (124415, 124415), (125278, 125279),
)  # fmt: skip
# zlib, base 85: the category of each run of code points, then its length as a varint.
RUNS = (
    "c-qxhTZm*w8Lt1Y%c*ni?wRU7eP(8RdS~z1+3aMqn_V>~i;`eSi1ERQB3|$UULbi81bqoH=t~eqd{Ge8;By2~<5LhXhz"
    "b!j_#hH|@j(ebsi3IeUv;{tcXo0!iNsTVs!vt@=fB?$ZG}k~kHRzzLxtIo!>Ap!W;`8D31?ksJGVaNuI;8xYeL(&wI=w"
    "fH&f$Z<HN}>GyU&{NA^n7H@01jQZ{Vsjj|?q)p|@ACf?6GrZ1LUR~Fv9_6Nka!GxjeCaN5kAr9q~3yP<3#;yz;oONXtT"
    "<LIgSK6{GUFAA~!6v{<rz%(4E?8Ag@DPUzIFL!X)+tt{vn7|gEA!Ijm~wd+ZVu$R04;|ct6Tw0#e)*aCrvkT;Oqb>fB~"
    "n{kYyz})nN!r!Puh<6Zty?swdnZ0kU%q4%GD{7kmk0t}1ZXDG_Xm3&;Ch2__Yq4!hw1!Je-LJ>_I4y|Yw9huua_f#F)N"
    "d+EV}%0=A(nn2Ca>MFCPi;TfILO{7LV3Zxul`_Vo@hFmn06|cc3foGcRI-#v1_#ImQSPGQ;$B|mWfwz7nPAOfdb&o#p#"
    "gCLRzoo1w%m9GPpgH+T<+*GNiNsZ4K_@oVj6{{2nT`$c3-B*v?vLB=v1f{q^d@Vw&8!tsy#M^*I@|@7b#?OK?UMNXOKG"
    "JaUt;XaDgO%cI6N+F>XANgfi+xOy!iZGRpsluz%H($?{(%w}?xV#eu`DHEsWoS+&NuDy`KP55xM}Sbkw+lee%4gD{QNa"
    "1gdwabs13wUr6ZJP{khik-(uIoEen-z`SW`IwQiyJ=^-ruL?8IyLRC9})ubuV2HLny$I#cz<AjJeuyWr`_~gfaO6yEpc"
    "|&>&*Ty3=`?XF_D9U5rs=O2!|!M5^9Iy({C7t>1iPl0!Q}7$PA0Eq3Y7u3Y~TJzVJ(>4e?x;`OtQ?b)gd?t#v~eY$6Fg"
    "BPqx&Do+E&1*d?uL4FA9mssq}0)^~(b!$skqg1rg2E1~^9$dG5@AFb4DVnKYDhT3`UKgn*?@ARb4l1yuD@jaJoKc>Uw1"
    "SHnYd^aMWs&nxmPL<gFXm6F8dBRk*B9e{M6Jtv&gSKcZ<rS84e^>1WXSt!f}!KFxK-(<EAG@PHyU@*$jVL7OTdNTV#C3"
    "~NRfj<K!)#^)8SO1`-oUrJ$F-_-h>QxpXy}VqM4C^<L-cW2UL-+76(f{+ZP*DCH!hvr}85uI@B-$%1BIQ@zp+`DWet<l"
    "!lGt8Y+$J8V6FcXn;Dn*apdC6U*zObO~vkG(qU2Ua2M|`c3?Wh(k!m>W?<aI*&HZ8a0ha<*;ug8ZoTAT!tu%iWbHDRWx"
    "W{)X>V6P^X9$E4Y%HE^mef2wE)IwGv-S{P#t;bSsV!RC@W)21+`X*b}*Yzx_#=R65L4&4jh(xG%QSv4qmC^c%s&Zm5j#"
    "!7V}KepvPgz*9v(TvYg~30;pTz=l<`!h*_UlP02u<h-dh0I@uUgp2KO<WNXOb0~KJSh|alny(a0sd-D5T}DOT14KC_3d"
    "^YMg+!IS7o!-c>eMG=;-#tqlrTw@CK027JBuV*_3j1FNAP<S9j6qU@Wx>KhVoGNTnuULRaYSnV#k*T`njBASJ=fSu#t$"
    "to$7e}LRwaKwa8J6$k;zTkj$p?eR|kr&|#PT2$2ueY+x;y!$u#1RF$-j@nfSx=|__*T6L9L?R1+GY(>~0#bnaRtlY~U("
    "}j9e>I_zw?KP_x9@QcESw4@H#+Z}Fh!+>Ec_Tf?zoSHkRxXY|0(?u^lsx@+7r(&z#k{ULK4~^GW5p{Ra+HYiq|J+EVzH"
    "y?zrHe#G?ygrpv^U;1DoM_^x!@jkT9GmF^wocMy#KUtWEFm&3i9`0n4v|L6~0c>m-vqlk9UY62ybwGzOVS49O*QGpAx)"
    "KuaHhT8SKB4Hr0V1i@^R-&s;q9L+_Ucx7TJ$CKp&b>bPNosuKA`5BthoNkGR_2Md7!CVjx@aUO&BG`4bhQU%85!+}0F}"
    "q&(pl=eWuo~Tpu>qT9ur)Bkcm;Nag#;yr&^Eau(|{w*3@ojX<%PKt;fxoAK@K-L;5W(5HE8Jy$3jyCb`V}W@eU1!B^-y"
    "z+3`vySV(XdnMfxjBS_H`w2>>$*hR1ctBP5eKf?)!IHQ4d!cCsIUei;^N1O>$a_${8MAaU)3_v_IaDpTDDP|zep??Vq9"
    "2g{-foRPY#fqbOI&K=gz_z60z#tYgeBvw%LeWX#V0bX1LDtliEK)!LCxs551<Id^+Onv{Gq{f~R|9$-<~Os>gB}*{ev$"
    "UiFxN;@o4#9XpRH-i*P(-ajjLMpT3v)4JaL&+z=Z<`q6u(vj4oxCcR={gVq3gLyvB*TxR^nLU9$nR>7ABEtCynWQAp^C"
    "1QE>74GnKHbUxa^iUMGxBF|y3nYe-A+7)|?uDm(!;Vaq}S{E}1eUd%P+IvkkMV*Up+1=Y~+BtERUW-@$>QnFzhV{7O|6"
    "<$wCT@BUElWOz%i>>R9J99wD2kN>pD5htJTE56#dXB?WprYTo7m~(c0{#4I;er68o=#h`AJFKrc@!R-^c;O^-V-OJSJO"
    "gtc~>GU$iY5gti||><01Ix6!OS?cOpe$G6@)`JO257XJYK{eZBuUAWEm{(ATjf95&#a=T1(qKA2J%<dG==_7l4ebr2S!"
    "g*Q0`Yw=?C<s}z2-_<VxS=+e?6f-OykCFwREBu95Ejvr^$OQJ8}!cVY1$YbtlGT#m>Ws8$x!#FB>yfc7H8=_FibH&nbU"
    "BaikYXuyf`&@lApZ!>X#oQ`kU96^V5zWg`I~5hnFh4rs4&3!*>?!e4F!u_g>!RuhYQuA+~*sv45FGO<uXiNqw0V7?Ko+"
    "Adtv$7meo&L-xp(YZ52Obz7d>5=Hz7g6=%UN?9X*jFf}Cuyn?W5pt<q(sG(1#Q>uV;-4IA)D-l~SOQpbFGAZzcR5Q2o?"
    "-4g#yy81``A0G*4*^S@SzLOGJo`BR#_{dTSvJB>f@u~pCl5m@-1+(3dWSo?1r(DU*|Vc-ORqiqTI&P=O}h;&($gSyL67"
    "Xb!3-y-=U_yg)6|V$6lb>`LxyMoX#(q5xla7lFre?(AG@@+B9>M2Pnp#w01_Qk9fS{^yzyc=W%n~oc0$>q^3b^ANqfNv"
    "HBk8lfq9O-9Y&rVwPR0A>6_jTF$n8z6a9QPN3%vOINSJBtyPYDxNh`?~kCEQJ&@55e6S~Pg@W<%Wu)yg#EhpYniFC`|i"
    "4YbA59LK0L}9R5U?{Lle(WAt&7sTZ*B+Y>pJ<C#A8IHDgYWv(QQrxHQO2C`92f`?=U^LCM(Yvcl=(R@w(ikN%j%E7P9N"
    "*%%XZu&6zhYiR65qbz0bwpijJenIZM<nuxr#FfS>+Fht<>6MUs(LmU;i1t7d(k@wM;pBk!eB_e$k|m6lUXJu^PryuS_<"
    "Zp#IuE{O*&5#218gkRW#Q`ev&%$>Iv=(+qvZ`!p0tM96SS)(pM7vXFY?NBtot-gEl%%fd2y%bQ>i}5wMoTkq3)$EVtr#"
    "Rv}}D>R(uy<WliC7I*}SmvPH43c?Qu_gL;?DCsQnD!nqTb&Fvzlfr8gr`adL7+F=_VwJzxGG#Gm`s_84)haVtY{)m1N-"
    "p}>p9sxQizPfFHYM!_>tI&=7q<+F=+Y-`mMRcP3p<*u+S0eOx8IA4w<656)0MdNknh)KLlgpW@uL`A-o4=p;Pv>WfKi*"
    "*?%ilz^c0_u6;~&+JtbNSZI!9M6Cj8y(FQD)peb0^D=AXFruT-4kTM=6htx+~JZydi#)2Bies(0kw=V)VNBcrvAjo7ra"
    "=+c|mh?N@~;tw8=@*t@}X9B*wwz#8?++h>2U3kb`HWxg~7TbZP!Bf7V;M{M3Z^Y5#>}^Ns!E-vxSVH4Tp3!L6AlW^oH^"
    "~%F(~QN#p8-|zx&i$dZD)37X9sJj@r&*al3DLLM}r>%V6*>@Em9_Oi-e??U*P-S<Dx=CDO5%lPC}!L{CVCrA4HQf0HqT"
    "}{dKx>q~0}o#*O<5{e$dptr_WBf6~0yRfwa?T!EXM_A|yu#%;gms^MA}_DVLuCt03-iRj(MXZ<t3<oOTg?)StGpKHGT`"
    "oXj28|z;)e<*)`(mpf))%VZR?0pZ>U+4?})c^XoX1V_Z%i}Z<"
)
