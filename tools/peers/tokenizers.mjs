// The ids that npm's @huggingface/tokenizers gives a text, one on a line, without those a post-processor adds.
//   npm install @huggingface/tokenizers && node tools/peers/tokenizers.mjs TOKENIZER.json TEXT > IDS
import { readFileSync } from 'node:fs';
import { Tokenizer } from '@huggingface/tokenizers';

const [definition, text] = process.argv.slice(2);
const tokenizer = new Tokenizer(JSON.parse(readFileSync(definition, 'utf8')), {});
const { ids } = tokenizer.encode(readFileSync(text, 'utf8'), { add_special_tokens: false });
process.stdout.write(ids.join('\n') + '\n');
