package relay

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"pgregory.net/rapid"
)

// codeOf returns the code of a connection error, and -1 for none.
func codeOf(err error) int {
	var ce *connError
	if errors.As(err, &ce) {
		return int(ce.code)
	}
	if err != nil {
		return -2
	}
	return -1
}

func TestParseFrame(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want string // type, flags, id, payload, length of the whole
		code int
	}{
		{"", "", -1},
		{"\x00\x00\x00\x00\x00\x00\x00\x00", "", -1},
		{"\x00\x00\x00\x00\x00\x00\x00\x00\x00", "0 0 0 \"\" 9", -1},
		{"\x00\x00\x05\x00\x01\x00\x00\x00\x03hello and more", "0 1 3 \"hello\" 14", -1},
		{"\x00\x00\x05\x00\x01\x00\x00\x00\x03hell", "", -1},
		{"\x00\x00\x00\xbb\xff\xff\xff\xff\xff", "187 255 2147483647 \"\" 9", -1}, // the reserved bit is ignored
		{"\x00\x40\x01\x00\x00\x00\x00\x00\x01", "", int(codeFrameSize)},          // known before it has come
		{"\xff\xff\xff\x00\x00\x00\x00\x00\x01", "", int(codeFrameSize)},
		{"\x00\x40\x00\x00\x00\x00\x00\x00\x01", "", -1},
	} {
		f, n, err := parseFrame([]byte(tt.in))
		got := ""
		if n > 0 {
			got = fmt.Sprintf("%d %d %d %q %d", f.typ, f.flags, f.id, f.payload, n)
		}
		if got != tt.want || codeOf(err) != tt.code {
			t.Errorf("%q: %s, %v; want %s, code %d", tt.in, got, err, tt.want, tt.code)
		}
	}
	whole := frameOf(http2.FrameData, 0, 1, strings.Repeat("x", maxFrameSize))
	if f, n, err := parseFrame(whole); n != len(whole) || len(f.payload) != maxFrameSize || err != nil {
		t.Errorf("the largest frame: %d of %d bytes, %v", n, len(whole), err)
	}
}

func TestUnpad(t *testing.T) {
	for _, tt := range []struct {
		flags   uint8
		in, out string
		code    int
	}{
		{0, "", "", -1},
		{0, "\x04x", "\x04x", -1},
		{flagPadded, "", "", int(codeFrameSize)},
		{flagPadded, "\x00", "", -1},
		{flagPadded, "\x00x", "x", -1},
		{flagPadded, "\x02xyz", "x", -1},
		{flagPadded, "\x03xyz", "", -1},
		{flagPadded, "\x04xyz", "", int(codeProtocol)},
		{flagPadded, "\x01", "", int(codeProtocol)},
		{flagPadded, "\xff" + strings.Repeat("p", 255), "", -1},
	} {
		f := frame{typ: frameData, flags: tt.flags, payload: []byte(tt.in)}
		p, err := f.unpad()
		if string(p) != tt.out || codeOf(err) != tt.code {
			t.Errorf("%q: %q, %v; want %q, code %d", tt.in, p, err, tt.out, tt.code)
		}
	}
}

// TestAppendFrames: what is written is what x/net/http2 reads.
func TestAppendFrames(t *testing.T) {
	b := appendSettings(nil, setting{settingMaxStreams, 1000}, setting{settingInitialWindow, 7})
	b = appendSettings(b)
	b = appendSettingsAck(b)
	b = appendPing(b, 0, []byte("12345678 and more"))
	b = appendPing(b, flagAck, []byte("abcdefgh"))
	b = appendGoAway(b, maxStreamID, codeEnhanceYourCalm, "calm")
	b = appendReset(b, 7, codeRefusedStream)
	b = appendWindowUpdate(b, 0, maxWindow)
	b = appendWindowUpdate(b, 9, 1)
	b = appendData(b, 3, []byte("hello"), false)
	b = appendData(b, 3, nil, true)
	p := new(peer)
	var got []string
	fr := http2.NewFramer(nil, bytes.NewReader(b))
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			break
		}
		e, err := p.event(f, new(event))
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.text)
	}
	want := []string{
		"SETTINGS MAX_CONCURRENT_STREAMS=1000 INITIAL_WINDOW_SIZE=7", "SETTINGS", "SETTINGS ACK",
		"PING ack=false 12345678", "PING ack=true abcdefgh", "GOAWAY 2147483647 ENHANCE_YOUR_CALM",
		"RST_STREAM 7 REFUSED_STREAM", "WINDOW_UPDATE 0 2147483647", "WINDOW_UPDATE 9 1",
		`DATA 3 end=false "hello"`, `DATA 3 end=true ""`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestAppendHeaders: a header block of any length is cut into frames that join to it.
func TestAppendHeaders(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 50).Draw(t, "frame size")
		block := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(t, "block")
		end := rapid.Bool().Draw(t, "end")
		b := appendHeaders([]byte("before"), 5, block, end, size)
		if string(b[:6]) != "before" {
			t.Fatal("what was there before is gone")
		}
		var joined []byte
		for i, rest := 0, b[6:]; len(rest) > 0; i++ {
			f, n, err := parseFrame(rest)
			if err != nil || n == 0 {
				t.Fatalf("frame %d: %v", i, err)
			}
			rest = rest[n:]
			joined = append(joined, f.payload...)
			wantType := frameContinuation
			if i == 0 {
				wantType = frameHeaders
			}
			if f.typ != wantType || f.id != 5 || len(f.payload) > size || f.has(flagEndHeaders) != (len(rest) == 0) || f.has(flagEndStream) != (end && i == 0) {
				t.Fatalf("frame %d: %+v", i, f)
			}
		}
		if !bytes.Equal(joined, block) {
			t.Fatalf("%x, want %x", joined, block)
		}
	})
}

func TestParseSettings(t *testing.T) {
	one := func(id settingID, v uint32) string {
		return string(appendSettings(nil, setting{id, v})[frameHeaderLen:])
	}
	for _, tt := range []struct {
		in   string
		want []setting
		code int
	}{
		{"", nil, -1},
		{"12345", nil, int(codeFrameSize)},
		{"1234567", nil, int(codeFrameSize)},
		{one(settingHeaderTableSize, 0), []setting{{settingHeaderTableSize, 0}}, -1},
		{one(settingHeaderTableSize, 1<<32-1), []setting{{settingHeaderTableSize, 1<<32 - 1}}, -1},
		{one(settingEnablePush, 0) + one(settingEnablePush, 1), []setting{{settingEnablePush, 0}, {settingEnablePush, 1}}, -1},
		{one(settingEnablePush, 2), nil, int(codeProtocol)},
		{one(settingMaxStreams, 1<<32-1), []setting{{settingMaxStreams, 1<<32 - 1}}, -1},
		{one(settingInitialWindow, maxWindow), []setting{{settingInitialWindow, maxWindow}}, -1},
		{one(settingInitialWindow, maxWindow+1), nil, int(codeFlowControl)},
		{one(settingMaxFrameSize, 0), nil, int(codeProtocol)},
		{one(settingMaxFrameSize, minMaxFrameSize-1), nil, int(codeProtocol)},
		{one(settingMaxFrameSize, minMaxFrameSize), []setting{{settingMaxFrameSize, minMaxFrameSize}}, -1},
		{one(settingMaxFrameSize, maxMaxFrameSize), []setting{{settingMaxFrameSize, maxMaxFrameSize}}, -1},
		{one(settingMaxFrameSize, maxMaxFrameSize+1), nil, int(codeProtocol)},
		{one(settingMaxHeaderListSize, 5), []setting{{settingMaxHeaderListSize, 5}}, -1},
		{one(0, 1) + one(7, 1) + one(0xffff, 1), nil, -1},
		{one(99, 1) + one(settingMaxStreams, 3), []setting{{settingMaxStreams, 3}}, -1},
	} {
		got, err := parseSettings([]byte(tt.in))
		if !slices.Equal(got, tt.want) || codeOf(err) != tt.code {
			t.Errorf("%x: %v, %v; want %v, code %d", tt.in, got, err, tt.want, tt.code)
		}
	}
}
