package relay

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// frameType is the type of an HTTP/2 frame (RFC 9113, section 6).
type frameType uint8

const (
	frameData frameType = iota
	frameHeaders
	framePriority
	frameReset
	frameSettings
	framePushPromise
	framePing
	frameGoAway
	frameWindowUpdate
	frameContinuation
)

const (
	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20
)

// settingID is a parameter of SETTINGS (RFC 9113, section 6.5.2).
type settingID uint16

const (
	settingHeaderTableSize   settingID = 1
	settingEnablePush        settingID = 2
	settingMaxStreams        settingID = 3
	settingInitialWindow     settingID = 4
	settingMaxFrameSize      settingID = 5
	settingMaxHeaderListSize settingID = 6
)

type setting struct {
	id    settingID
	value uint32
}

// code is an HTTP/2 error code (RFC 9113, section 7).
type code uint32

const (
	codeNone code = iota
	codeProtocol
	codeInternal
	codeFlowControl
	codeSettingsTimeout
	codeStreamClosed
	codeFrameSize
	codeRefusedStream
	codeCancel
	codeCompression
	codeConnect
	codeEnhanceYourCalm
)

const (
	preface         = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	frameHeaderLen  = 9
	maxFrameSize    = 16384 // that we take: the default, so that it need not be announced
	minMaxFrameSize = 16384
	maxMaxFrameSize = 1<<24 - 1
	maxWindow       = 1<<31 - 1
	defaultWindow   = 65535
	maxStreamID     = 1<<31 - 1
)

// connError ends a connection with GOAWAY.
type connError struct {
	code code
	text string
}

func (e *connError) Error() string { return fmt.Sprintf("HTTP/2 error %d: %s", e.code, e.text) }

// frame is one frame; its payload is valid only as long as the read buffer.
type frame struct {
	typ     frameType
	flags   uint8
	id      uint32
	payload []byte
}

func (f *frame) has(flag uint8) bool { return f.flags&flag != 0 }

// parseFrame reads one frame from the beginning of b. n is its length with its
// header, 0 where b does not hold all of it yet.
func parseFrame(b []byte) (f frame, n int, err error) {
	if len(b) < frameHeaderLen {
		return f, 0, nil
	}
	length := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
	if length > maxFrameSize {
		return f, 0, &connError{codeFrameSize, "frame too large"}
	}
	if len(b) < frameHeaderLen+length {
		return f, 0, nil
	}
	f.typ, f.flags = frameType(b[3]), b[4]
	f.id = binary.BigEndian.Uint32(b[5:]) & maxStreamID
	f.payload = b[frameHeaderLen : frameHeaderLen+length]
	return f, frameHeaderLen + length, nil
}

// unpad removes the padding of a DATA or HEADERS payload (RFC 9113, section 6.1).
func (f *frame) unpad() ([]byte, error) {
	p := f.payload
	if !f.has(flagPadded) {
		return p, nil
	}
	if len(p) == 0 {
		return nil, &connError{codeFrameSize, "padded frame without a pad length"}
	}
	pad := int(p[0])
	if pad >= len(p) {
		return nil, &connError{codeProtocol, "more padding than payload"}
	}
	return p[1 : len(p)-pad], nil
}

// empty reports whether a DATA frame carries nothing, not counting padding.
func (f *frame) empty() bool {
	return len(f.payload) == 0 || f.has(flagPadded) && len(f.payload) == 1+int(f.payload[0])
}

func appendFrameHeader(b []byte, length int, typ frameType, flags uint8, id uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), byte(typ), flags,
		byte(id>>24), byte(id>>16), byte(id>>8), byte(id))
}

func appendSettings(b []byte, settings ...setting) []byte {
	b = appendFrameHeader(b, 6*len(settings), frameSettings, 0, 0)
	for _, s := range settings {
		b = binary.BigEndian.AppendUint16(b, uint16(s.id))
		b = binary.BigEndian.AppendUint32(b, s.value)
	}
	return b
}

func appendSettingsAck(b []byte) []byte { return appendFrameHeader(b, 0, frameSettings, flagAck, 0) }

func appendPing(b []byte, flags uint8, data []byte) []byte {
	return append(appendFrameHeader(b, 8, framePing, flags, 0), data[:8]...)
}

func appendGoAway(b []byte, last uint32, c code, debug string) []byte {
	b = appendFrameHeader(b, 8+len(debug), frameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(c))
	return append(b, debug...)
}

func appendReset(b []byte, id uint32, c code) []byte {
	return binary.BigEndian.AppendUint32(appendFrameHeader(b, 4, frameReset, 0, id), uint32(c))
}

func appendWindowUpdate(b []byte, id, increment uint32) []byte {
	return binary.BigEndian.AppendUint32(appendFrameHeader(b, 4, frameWindowUpdate, 0, id), increment)
}

// appendHeaders writes a header block as HEADERS and as many CONTINUATION frames
// as the peer's frame size asks for.
func appendHeaders(b []byte, id uint32, block []byte, end bool, frameSize int) []byte {
	var flags uint8
	if end {
		flags = flagEndStream
	}
	typ := frameHeaders
	for {
		n := min(len(block), frameSize)
		if n == len(block) {
			flags |= flagEndHeaders
		}
		b = append(appendFrameHeader(b, n, typ, flags, id), block[:n]...)
		if block = block[n:]; len(block) == 0 {
			return b
		}
		typ, flags = frameContinuation, 0
	}
}

func appendData(b []byte, id uint32, p []byte, end bool) []byte {
	var flags uint8
	if end {
		flags = flagEndStream
	}
	return append(appendFrameHeader(b, len(p), frameData, flags, id), p...)
}

// lastOfEach returns the settings that count: of each parameter the last (RFC 9113,
// section 6.5.3). Each may concern every stream, and one frame has room for thousands.
func lastOfEach(list []setting) []setting {
	var seen [settingMaxHeaderListSize + 1]bool
	var last []setting
	for _, s := range slices.Backward(list) {
		if !seen[s.id] {
			seen[s.id] = true
			last = append(last, s)
		}
	}
	return last
}

// parseSettings reads a SETTINGS payload and checks each value (RFC 9113, section
// 6.5.2). Unknown parameters are left out.
func parseSettings(p []byte) ([]setting, error) {
	if len(p)%6 != 0 {
		return nil, &connError{codeFrameSize, "SETTINGS of an odd length"}
	}
	var list []setting
	for ; len(p) > 0; p = p[6:] {
		s := setting{settingID(binary.BigEndian.Uint16(p)), binary.BigEndian.Uint32(p[2:])}
		switch s.id {
		case settingEnablePush:
			if s.value > 1 {
				return nil, &connError{codeProtocol, "ENABLE_PUSH is neither 0 nor 1"}
			}
		case settingInitialWindow:
			if s.value > maxWindow {
				return nil, &connError{codeFlowControl, "INITIAL_WINDOW_SIZE too large"}
			}
		case settingMaxFrameSize:
			if s.value < minMaxFrameSize || s.value > maxMaxFrameSize {
				return nil, &connError{codeProtocol, "MAX_FRAME_SIZE out of range"}
			}
		case settingHeaderTableSize, settingMaxStreams, settingMaxHeaderListSize:
		default:
			continue
		}
		list = append(list, s)
	}
	return list, nil
}
